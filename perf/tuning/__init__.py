"""What `python -m perf.tune` is made of: settings to try, a place to try them, and the rule that chooses."""
