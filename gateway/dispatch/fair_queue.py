"""Requests that wait for Triton: in a fair order between clients, and taken in groups."""

from __future__ import annotations

from collections import OrderedDict, deque

from gateway.dispatch.work import PendingItem


class FairQueue:
    """First come, first served for each client; clients take turns. What is put back comes before all others.

    Suspects wait apart: the next of them goes when nobody works on another one.
    """

    def __init__(self) -> None:
        self._retried: deque[PendingItem] = deque()
        self._suspects: deque[PendingItem] = deque()
        self._by_client: OrderedDict[str, deque[PendingItem]] = OrderedDict()
        self.bytes = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def queued_by(self, client: str) -> int:
        """How many of a client's requests wait that were never sent."""
        return len(self._by_client.get(client, ()))

    @property
    def clients(self) -> int:
        """How many clients wait."""
        return len(self._by_client)

    def add(self, item: PendingItem) -> None:
        """Let one wait."""
        if item.record.is_suspect:  # since an earlier request
            self._suspects.append(item)
        else:
            self._by_client.setdefault(item.client, deque()).append(item)
        self._count += 1
        self.bytes += len(item.picture)

    def put_back(self, item: PendingItem) -> None:
        """Let one wait that was taken already: before all that were not."""
        (self._suspects if item.record.is_suspect else self._retried).append(item)
        self._count += 1
        self.bytes += len(item.picture)

    def remove(self, item: PendingItem) -> None:
        """Forget one, wherever it waits."""
        own = self._by_client.get(item.client)
        for queue in (self._retried, self._suspects, own):
            if queue and item in queue:
                queue.remove(item)
                self._left(item)
        if own is not None and not own:
            del self._by_client[item.client]

    def eviction_candidate(self, client: str, coming: int = 0) -> PendingItem | None:
        """The last request of the client with the most that wait, if that one keeps more than this client has.

        `coming`: how many of this client's are about to be added.
        """
        longest = max(self._by_client.values(), key=len, default=deque[PendingItem]())
        return longest[-1] if len(longest) > self.queued_by(client) + coming + 1 else None

    def everyone(self) -> list[PendingItem]:
        """All that wait."""
        others = (item for queue in self._by_client.values() for item in queue)
        return [*self._retried, *self._suspects, *others]

    def last(self) -> PendingItem | None:
        """The last request of the client with the most that wait."""
        longest = max(self._by_client.values(), key=len, default=None)
        return longest[-1] if longest else None

    def take_suspect(self) -> PendingItem | None:
        """The next of the suspects, which goes alone; None where there is none."""
        if not self._suspects:
            return None
        item = self._suspects.popleft()
        self._left(item)
        return item

    def acquit_company(self) -> None:
        """The guilty one was found: acquit those that were suspects because of their company."""
        for item in self._suspects:
            if not item.was_alone:
                item.record.acquit()
        self.regroup()

    def regroup(self) -> None:
        """Those that are suspects no more go as all others do, and next."""
        for item in [item for item in self._suspects if not item.record.is_suspect]:
            self._suspects.remove(item)
            self._retried.append(item)

    @property
    def has_unsuspected(self) -> bool:
        """Whether anybody waits who is no suspect."""
        return self._count > len(self._suspects)

    def fitting(self, most_bytes: int) -> int:
        """How many of those that wait, of their mean size, are not larger together; at least one."""
        return max(1, most_bytes * self._count // max(1, self.bytes))

    def take(self, most: int, most_bytes: int) -> list[PendingItem]:
        """The next, and with it what can share its call: not more than so many, and not larger together."""
        group: list[PendingItem] = []
        size = 0

        def fits(item: PendingItem) -> bool:
            if not group:
                return True
            is_small = size + len(item.picture) <= most_bytes
            return is_small and not item.is_alone and not group[0].is_alone

        while len(group) < most and self._retried and fits(self._retried[0]):
            group.append(self._retried.popleft())
            size += len(group[-1].picture)
        passed_over: list[tuple[str, deque[PendingItem]]] = []
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
        for item in group:
            self._left(item)
        return group

    def _left(self, item: PendingItem) -> None:
        self._count -= 1
        self.bytes -= len(item.picture)
