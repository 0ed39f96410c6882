"""The Tritons: their protocol, which there are, what each has, and what may answer on it."""
