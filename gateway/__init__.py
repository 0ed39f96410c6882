"""The public JSON contract in front of Triton. CLI: `python -m gateway`.

The way of a request, by file: connection (bytes) -> middleware and access (who asks) -> app (routes) -> ingest (bytes
to a picture) -> router (who answers) -> predict (ask, verify) -> dispatch (wait, group, retry) -> triton (gRPC) ->
views and schemas (the answer) or errors (the problem) -> mirrors (the comparison after it).
Beside it run: fleet, releases and activation (what may answer), routing (the file that says who does).
"""

__version__ = "0.1.0"
