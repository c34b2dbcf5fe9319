"""Judge which of two candidates is better: win rate of A over B, with all that belongs beside it.

A and B are completions files, as `dpoctl sample` writes them: JSONL with `prompt_id`, `prompt`, `completion` and, of several
samples a prompt, `k`. They pair by prompt_id, k and temperature. With A alone, B is the `reference` (the human answer) of its
rows. A first comparison, from prompts to the win rate:

\b
  dpoctl sample --model runs/dpo --prompts test.jsonl --out dpo.jsonl
  dpoctl sample --model runs/sft --prompts test.jsonl --out sft.jsonl
  dpoctl judge dpo.jsonl sft.jsonl --out wins.jsonl --model gpt-5-mini

That needs pip install 'dpoctl[judge]' and the key in OPENAI_API_KEY. With --dry-run it only says how many judgements that is,
about how many tokens and, by --price-in and --price-out, dollars; --limit 20 makes it small. Other judges:

\b
  a server of your own (vLLM, llama.cpp, transformers serve; needs no key):
    dpoctl judge dpo.jsonl sft.jsonl --out wins.jsonl \\
      --model NAME --base-url http://localhost:8000/v1
  a classifier or reward model, offline:
    dpoctl judge dpo.jsonl sft.jsonl --out wins.jsonl \\
      --backend scorer --scorer runs/toy/classifier --criterion sentiment
  people, by a page for the browser; its export comes back with --answers:
    dpoctl judge dpo.jsonl sft.jsonl --out wins.jsonl \\
      --backend human --form form.html
    dpoctl judge dpo.jsonl sft.jsonl --out wins.jsonl \\
      --backend human --answers answers-ada.json
  summaries against the human ones, at most five dollars:
    dpoctl judge dpo.jsonl --criterion summary-c --out wins.jsonl \\
      --model gpt-5-mini --price-in 0.25 --price-out 2 --max-cost 5

A table of the win rate goes to the terminal: its 95 % interval, wins, ties and losses, the share that flipped with the order,
the share without a verdict (invalid, no tie), lengths, and the win rate at equal length. --out keeps every judgement, its
manifest the summary; `dpoctl report` shows them. Answers are kept, so the same command again, after exit 75 (the server was
busy or down) or 2 (--max-cost is reached), pays for none of them twice.
"""
