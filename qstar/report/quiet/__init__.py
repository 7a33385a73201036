"""A Quiet-STaR run, looked at afterwards: `run` and `texts` read its folder, `page` makes a page of it."""
