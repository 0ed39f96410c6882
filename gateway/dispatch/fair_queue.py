"""Requests that wait for Triton: in a fair order between clients, and taken in groups."""

from __future__ import annotations

from collections import OrderedDict, deque

from gateway.dispatch.work import Waiting


class Line:
    """First come, first served for each client; clients take turns. What is put back comes before all others.

    Suspects wait apart: the next of them goes when nobody works on another one.
    """

    def __init__(self) -> None:
        self._again: deque[Waiting] = deque()
        self._suspects: deque[Waiting] = deque()
        self._by_client: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self.bytes = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, client: str) -> int:
        """How many of a client's requests wait."""
        return len(self._by_client.get(client, ()))

    @property
    def clients(self) -> int:
        """How many clients wait."""
        return len(self._by_client)

    def add(self, waiting: Waiting) -> None:
        """Let one wait."""
        if waiting.record.is_suspect:  # of another release
            self._suspects.append(waiting)
        else:
            self._by_client.setdefault(waiting.client, deque()).append(waiting)
        self._count += 1
        self.bytes += len(waiting.picture)

    def put_back(self, waiting: Waiting) -> None:
        """Let one wait that was taken already: it is the next."""
        (self._suspects if waiting.record.is_suspect else self._again).append(waiting)
        self._count += 1
        self.bytes += len(waiting.picture)

    def remove(self, waiting: Waiting) -> None:
        """Forget one, wherever it waits."""
        own = self._by_client.get(waiting.client)
        for queue in (self._again, self._suspects, own):
            if queue and waiting in queue:
                queue.remove(waiting)
                self._left(waiting)
        if own is not None and not own:
            del self._by_client[waiting.client]

    def last_of_longer(self, client: str) -> Waiting | None:
        """The last request of the client with the most that wait, should it leave them more than this client has."""
        longest = max(self._by_client.values(), key=len, default=deque[Waiting]())
        return longest[-1] if len(longest) > self.of(client) + 1 else None

    def everyone(self) -> list[Waiting]:
        """All that wait."""
        others = (waiting for queue in self._by_client.values() for waiting in queue)
        return [*self._again, *self._suspects, *others]

    def last(self) -> Waiting | None:
        """The last request of the client with the most that wait."""
        longest = max(self._by_client.values(), key=len, default=None)
        return longest[-1] if longest else None

    def take_suspect(self) -> Waiting | None:
        """The next of the suspects, which goes alone; None where there is none."""
        if not self._suspects:
            return None
        waiting = self._suspects.popleft()
        self._left(waiting)
        return waiting

    def acquit_company(self) -> None:
        """The guilty one was found: acquit those that were suspects because of their company."""
        for waiting in self._suspects:
            if not waiting.was_alone:
                waiting.record.acquit()
        self.regroup()

    def regroup(self) -> None:
        """Those that are suspects no more go as all others do, and next."""
        for waiting in [waiting for waiting in self._suspects if not waiting.record.is_suspect]:
            self._suspects.remove(waiting)
            self._again.append(waiting)

    @property
    def is_ready(self) -> bool:
        """Whether anybody waits who is no suspect."""
        return self._count > len(self._suspects)

    def fitting(self, most_bytes: int) -> int:
        """How many of those that wait, of their mean size, are not larger together; at least one."""
        return max(1, most_bytes * self._count // max(1, self.bytes))

    def take(self, most: int, most_bytes: int) -> list[Waiting]:
        """The next, and with it what can share its call: not more than so many, and not larger together."""
        group: list[Waiting] = []
        size = 0

        def fits(waiting: Waiting) -> bool:
            if not group:
                return True
            is_small = size + len(waiting.picture) <= most_bytes
            return is_small and not waiting.is_alone and not group[0].is_alone

        while len(group) < most and self._again and fits(self._again[0]):
            group.append(self._again.popleft())
            size += len(group[-1].picture)
        passed_over: list[tuple[str, deque[Waiting]]] = []
        while len(group) < most and self._by_client:
            client, queue = self._by_client.popitem(last=False)
            if not fits(queue[0]):
                passed_over.append((client, queue))
                continue
            group.append(queue.popleft())
            size += len(group[-1].picture)
            if queue:
                self._by_client[client] = queue
        for client, queue in reversed(passed_over):  # their turn stays: the next group begins with them
            self._by_client[client] = queue
            self._by_client.move_to_end(client, last=False)
        for waiting in group:
            self._left(waiting)
        return group

    def _left(self, waiting: Waiting) -> None:
        self._count -= 1
        self.bytes -= len(waiting.picture)
