"""Reports: runs, evaluations, judgements and samples as figures, an HTML page and tables on the terminal."""
