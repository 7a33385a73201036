"""What a run looks like afterwards: `run.read_run` reads its folder, `html.write_report` makes one page of it."""
