"""HTTP: connections, heads and bodies, bounded in size, time and number; a request's deadline."""
