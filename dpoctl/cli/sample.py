"""Sample completions of prompts from a model.

Example: dpoctl sample --model runs/dpo --prompts imdb/prompts.test.jsonl --out samples.jsonl
"""
