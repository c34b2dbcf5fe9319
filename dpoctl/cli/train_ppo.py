"""Align a policy by PPO with a KL penalty to its reference.

The reward is any SCORER: a reward model of train-rm, a classifier, a function of your own.

Example: dpoctl train-ppo --model runs/sft --prompts prompts.train.jsonl --reward runs/rm --target-kl 6 --out runs/ppo
"""
