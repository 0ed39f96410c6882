"""What clients see: the schemas of the contract, the answers, the pages for browsers."""
