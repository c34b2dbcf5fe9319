"""Judge which of two candidates is better: win rate of A over B, with all that belongs beside it.

A and B are completions files (of `sample`), paired by prompt_id and k; with A alone its rows' `reference` is B.

Examples:

dpoctl judge dpo.jsonl sft.jsonl --backend scorer --scorer runs/toy/classifier --criterion sentiment --out j.jsonl

dpoctl judge dpo.jsonl --model gpt-5.2 --criterion summary-c --out j.jsonl      (key: OPENAI_API_KEY)

dpoctl judge dpo.jsonl sft.jsonl --model NAME --base-url http://localhost:8000/v1 --out j.jsonl

dpoctl judge dpo.jsonl sft.jsonl --backend human --form form.html --out j.jsonl, and later the same with --answers FILE
"""
