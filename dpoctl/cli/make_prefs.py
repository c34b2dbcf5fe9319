"""Sample completions for every prompt, score them, and write the pairs as preferences.

Example: dpoctl make-prefs --model runs/sft --prompts imdb/prompts.train.jsonl --out prefs.jsonl
"""
