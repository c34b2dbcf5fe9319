"""Reports: what runs, evaluations and samples left on disk, as figures, an HTML page and a table on the terminal."""
