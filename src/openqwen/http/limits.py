"""Limits on work in progress: how much at once, for how long, and only while the client waits."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openqwen.http.errors import ApiError

Result = TypeVar("Result")


class ConcurrencyLimit:
    """Places for work in progress. A request that finds too few is told when to come back."""

    def __init__(self, limit: int):
        self.limit, self.taken = limit, 0
        self._seconds: deque[float] = deque(maxlen=64)  # what the latest pieces of work took

    def take(self, count: int) -> None:
        """Take places. Raises ApiError: 429 where too few are free, 400 where there never are."""
        if count > self.limit:
            message = f"This request asks for {count} answers; the server takes {self.limit} at "
            message += "once. Send fewer prompts or a smaller n."
            raise ApiError(400, message, code="too_many_answers")
        if self.taken + count > self.limit:
            mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
            retry = min(max(round(mean), 1), 60)
            message = f"The server is busy: {self.taken} of {self.limit} places are taken, and "
            message += f"this request needs {count}. Try again in {retry} seconds."
            raise ApiError(429, message, code="queue_full", retry=retry)
        self.taken += count

    def release(self, count: int, seconds: float | None = None) -> None:
        """Give places back. seconds: how long the work took, where it was finished."""
        self.taken -= count
        assert self.taken >= 0
        if seconds is not None:
            self._seconds.append(seconds)


async def while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, Result],
    seconds: float | None = None,
) -> Result | None:
    """The result of the work.

    The work is cancelled, and None returned, when the client disconnects or the time is over.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(receive))
    try:
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({task, disconnect}, timeout=seconds, return_when=first)
        return task.result() if task.done() else None
    finally:
        disconnect.cancel()
        task.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events.

    Args:
        frames: the events as bytes.
        close: called at the end in any case: all is sent, the client has left, or an error.
        seconds: time limit of the whole stream.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], None], seconds: float):
        super().__init__()
        self._frames, self._close, self._seconds = frames, close, seconds
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await while_connected(receive, write(), self._seconds)
        finally:
            self._close()
