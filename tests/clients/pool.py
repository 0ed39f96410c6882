"""aiohttp with a pool that keeps its connections. Arguments: address, picture, seconds between requests.

Prints each answer's status, and how often a connection was opened and used again.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

address, path, *pauses = sys.argv[1:]
seen: Counter[str] = Counter()


async def main() -> None:
    trace = aiohttp.TraceConfig()

    def count(what: str) -> Callable[..., Awaitable[None]]:
        async def happened(*_: object) -> None:
            seen[what] += 1

        return happened

    trace.on_connection_create_end.append(count("opened"))
    trace.on_connection_reuseconn.append(count("used again"))
    connector = aiohttp.TCPConnector(limit=4, keepalive_timeout=600)
    picture = Path(path).read_bytes()
    async with aiohttp.ClientSession(connector=connector, trace_configs=[trace]) as session:

        async def ask() -> None:
            async with session.post(address, data=picture, headers={"Content-Type": "image/jpeg"}) as answer:
                await answer.read()
                seen[str(answer.status)] += 1

        for pause in ["0", *pauses]:
            await asyncio.sleep(float(pause))
            await asyncio.gather(*(ask() for _ in range(4)))


asyncio.run(main())
print(dict(seen))
