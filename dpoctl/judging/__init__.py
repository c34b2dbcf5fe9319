"""Judges: which of two candidates is better, asked in both orders, and counted with intervals."""
