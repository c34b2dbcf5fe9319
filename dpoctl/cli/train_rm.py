"""Train a reward model on preferences (Bradley-Terry), for PPO and best-of-N.

The run directory is a sequence classifier with one label, which every SCORER option takes.

Example: dpoctl train-rm --model runs/sft --data prefs.jsonl --out runs/rm
"""
