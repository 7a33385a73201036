"""A run, looked at afterwards: `run.read_run` reads its folder, `html.write_report` makes a page of it."""
