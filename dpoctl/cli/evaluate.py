"""Reward, sequence KL to the reference, lengths and fluency of models on unseen prompts.

Example: dpoctl evaluate --model runs/dpo --model runs/sft --ref runs/sft --prompts imdb/prompts.test.jsonl --out eval.jsonl
"""
