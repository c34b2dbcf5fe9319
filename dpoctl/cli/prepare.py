"""Prepare a task's rows: texts for SFT, preferences where the task has them, prompts for training and testing.

imdb: film reviews from the hub (stanfordnlp/imdb) or --source; prompts are prefixes of 2 to 8 tokens.
hh: Anthropic's dialogues as preferences; test prompts carry the chosen answer as reference.
tldr: Reddit posts: comparisons of summaries, test prompts with the human summary as reference.
cnn-dm: news articles with their highlights as reference, for summaries out of distribution.
toy: a small world that dpoctl makes itself, offline: reviews, a base language model and a sentiment classifier.
"""
