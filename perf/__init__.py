"""Latency under load, measured with the real perf_analyzer. CLI: `python -m perf`."""
