"""`python -m mtlfast`: what was built (info), and the microbenchmark (bench)."""

from mtlfast._cli import app

app(prog_name="python -m mtlfast")
