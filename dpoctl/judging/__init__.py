"""Judges: which of two candidates is better, asked in ways that do not bend the answer, counted with intervals."""
