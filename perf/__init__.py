"""Latency under load, measured on the running thing and held against budgets. CLI: `python -m perf`."""
