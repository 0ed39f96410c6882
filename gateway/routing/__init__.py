"""Which release answers: the routing file, and the releases of all servers."""
