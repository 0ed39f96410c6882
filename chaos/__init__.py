"""Faults on a real stack under load, and what its clients see of them."""
