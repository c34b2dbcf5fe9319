"""Fine-tune a language model on texts, on completions of prompts, or on one side of preferences (Preferred-FT).

Example: dpoctl sft --model gpt2-large --data imdb/sft.jsonl --out runs/sft
"""
