"""Prepare a task's rows: SFT texts, and prompts for training and testing from different reviews.

imdb: film reviews from the hub (stanfordnlp/imdb) or --source; prompts are prefixes of 2 to 8 tokens.
toy: a small world that dpoctl makes itself, offline: reviews, a base language model and a sentiment classifier.
"""
