"""Add a scorer's score to every row that has text.

Example: dpoctl score --data samples.jsonl --scorer siebert/sentiment-roberta-large-english --out scored.jsonl
"""
