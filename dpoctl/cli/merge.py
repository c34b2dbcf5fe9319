"""Join the shards of a row output into one file, or an adapter and its base into one model.

Shards are what sample, make-prefs, score, judge and evaluate write with --shard i/n; gaps and duplicates are refused, and
the file is, byte for byte, what the command writes without --shard.

Examples:

dpoctl merge samples.1.jsonl samples.2.jsonl samples.3.jsonl --out samples.jsonl

dpoctl merge runs/dpo-lora --base runs/sft --out runs/dpo
"""
