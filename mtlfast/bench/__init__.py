"""The microbenchmark: what is timed, against what, and how it is shown."""
