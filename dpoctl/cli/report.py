"""Draw a report from run directories, evaluations and completions: an HTML page, figures, a table on the terminal.

Example: dpoctl report runs/sft runs/dpo eval.jsonl --out report
"""
