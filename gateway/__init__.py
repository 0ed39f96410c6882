"""The public JSON contract in front of Triton. CLI: `python -m gateway`.

The way of a request, by file: app (routes) -> ingest (bytes to a picture) -> router (who answers) -> predict (call,
verify) -> triton (gRPC) -> views and schemas (the answer) or errors (the problem) -> mirrors (the comparison after it).
Beside it run: releases and activation (what may answer), routing (the file that says who does).
"""

__version__ = "0.1.0"
