"""Align a policy with preferences by DPO or one of its relatives.

The rows hold prompt, chosen and rejected, from make-prefs or your own.

Example: dpoctl train-dpo --model runs/sft --data prefs.jsonl --beta 0.1 --out runs/dpo
"""
