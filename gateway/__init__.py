"""The public JSON contract in front of Triton. CLI: `python -m gateway`.

The way of a request, by room: http (bytes) -> auth (who asks) -> app (routes) -> routing (who answers) -> predict (ask,
verify) -> dispatch (wait, group, retry) -> triton (gRPC) -> api (the answer) or problems -> mirrors (the comparison
after it). docs/code.md draws it.
"""

__version__ = "0.1.0"
