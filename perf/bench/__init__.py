"""`make bench`: the whole stack beside the limit of the machine, and beside what one would write instead."""
