"""Reports: `pages.write_report` writes the page of a run folder; `read.read_run` and `stats` give its numbers."""
