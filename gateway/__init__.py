"""The public JSON contract in front of Triton. CLI: `python -m gateway`.

The way of a request, by file: app (routes) -> ingest (bytes to a picture) -> predict (route, call, verify)
-> releases (which ensemble) -> triton (gRPC) -> schemas (the answer) or errors (the problem).
"""

__version__ = "0.1.0"
