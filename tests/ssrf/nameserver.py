"""A name server on a loopback port: what it answers is a table, and may change from one question to the next."""

from __future__ import annotations

import collections
import socketserver
import threading
from collections.abc import Callable, Mapping
from typing import Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

Record = tuple[str, str]
"""Type and value: ("A", "127.0.0.1"), ("AAAA", "::1"), ("CNAME", "elsewhere.test.")."""
Records = list[Record]
SILENCE, FAILURE = "silence", "failure"
"""In place of records: no answer at all; SERVFAIL."""


class NameServer:
    """`names` gives a name one answer, or a tuple of answers: the n-th for the n-th question, then the last."""

    def __init__(self, names: Mapping[str, Records | tuple[Records, ...] | str]) -> None:
        self.names = names
        self.asked: collections.Counter[tuple[str, str]] = collections.Counter()
        """Questions by name and type."""
        self._server = socketserver.UDPServer(("127.0.0.1", 0), _handler(self._answer))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, wire: bytes) -> bytes | None:
        query = dns.message.from_wire(wire)
        (question,) = query.question
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        records = self.names.get(name)
        if isinstance(records, tuple):
            records = records[min(self.asked[name, kind], len(records) - 1)]
        self.asked[name, kind] += 1
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        if records == SILENCE:
            return None
        if records is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif isinstance(records, str):
            response.set_rcode(dns.rcode.SERVFAIL)
        else:
            owner = question.name
            for record, value in records:
                if record == "CNAME":
                    response.answer.append(dns.rrset.from_text(owner, 1, "IN", record, value))
                    owner = dns.name.from_text(value)
                elif record == kind:
                    response.answer.append(dns.rrset.from_text(owner, 1, "IN", record, value))
        return response.to_wire()


def _handler(answer: Callable[[bytes], bytes | None]) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire, sock = self.request
            if (response := answer(wire)) is not None:
                sock.sendto(response, self.client_address)

    return Handler
