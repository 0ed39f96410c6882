"""From requests to calls: who waits, who goes together, to which server, and what happens when a call fails."""
