"""`python -m perf.gpu`: what a GPU makes of the service, measured in one run without a network.

`bare` runs the model alone, `stack` the whole service with other settings, `shares` looks at what is busy meanwhile,
`report` puts it into tables.
"""
