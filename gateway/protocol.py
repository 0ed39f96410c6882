"""What is refused before there is a request: bytes that are no HTTP get a problem, too, not uvicorn's plain text."""

from __future__ import annotations

import uuid

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import MEDIA_TYPE, Failure, Problem


class ProblemProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, with the one answer that it writes by itself."""

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, and close the connection: nobody knows where the next request begins."""
        problem = Problem.of(Failure("invalid_http", msg), uuid.uuid4().hex)
        body = problem.model_dump_json().encode()
        head = (
            f"HTTP/1.1 {problem.status} Bad Request\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
            f"X-Request-ID: {problem.request_id}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
