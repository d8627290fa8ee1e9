"""What a request passes before anything reads it: who asks, from where, how much, how slowly; and
how it may leave.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from openqwen.serve.errors import ApiError, identity

Result = TypeVar("Result")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Gate:
    """Checks the key, the Host (a page that rebinds its name to 127.0.0.1 is not us), the size and
    the pace of a body.

    open_paths: what anybody may read without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: list[str],
        hosts: list[str],
        open_paths: frozenset[str],
        limit: int,
        idle: float,
    ):
        self._app, self._keys = app, [key.encode() for key in keys]
        self._hosts, self._open = [host.lower() for host in hosts], open_paths
        self._limit, self._idle = limit, idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        own = [
            *_HEADERS,
            (b"x-request-id", headers.get(b"x-request-id") or identity("req").encode()),
        ]
        if scope["method"] == "HEAD":  # the protocol leaves the body out
            scope = {**scope, "method": "GET"}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(h for h in own if h[0] not in present)]
            await send(message)

        try:
            self._check(scope["path"], headers)
            async with asyncio.timeout(self._idle):
                body = await self._read(receive)
        except TimeoutError:
            return await ApiError(408, "The body did not come in time.").response()(
                scope, receive, told
            )
        except ApiError as error:
            return await error.response()(scope, receive, told)
        if body is None:  # gone
            return None
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replayed() -> Message:
            nonlocal message
            given, message = message, None
            return given or await receive()

        return await self._app(scope, replayed, told)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client left."""
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._limit:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower().rpartition(":")
        if (
            self._hosts
            and (host[0] if host[0] and host[2].isdigit() else "".join(host)) not in self._hosts
        ):
            raise ApiError(403, "This Host is not ours.", code="host_not_allowed")
        if self._keys and path not in self._open:
            word, _, given = headers.get(b"authorization", b"").partition(b" ")
            key = given.strip() if word.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            if not sum(
                hmac.compare_digest(key, known) for known in self._keys
            ):  # all, so that time tells nothing
                raise ApiError(401, "A valid API key is needed.", code="invalid_api_key")
        if int(headers.get(b"content-length", b"0")) > self._limit:
            raise self._too_large()
        coding = headers.get(b"content-encoding", b"").decode("latin-1")
        if coding.lower() not in ("", "identity"):
            told = f"This body is compressed ({coding}), which is not read here; send it as it is."
            raise ApiError(400, told, "Content-Encoding")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limit} bytes.", code="body_too_large")


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, but a client that dawdles over its headers is let go of."""

    seconds = 20.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new client."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """More from a client; the time for its headers begins with their first bytes."""
        waits = self.cycle is None or self.cycle.response_complete
        super().data_received(data)
        if waits and (self.cycle is None or self.cycle.response_complete):
            self._watch()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._late)

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or (self.cycle.response_complete and self.conn.trailing_data[0]):
            self.transport.close()


async def until_gone(
    receive: Receive, work: Coroutine[Any, Any, Result], seconds: float | None = None
) -> Result | None:
    """The result of the work; None, and the work cancelled, when the client leaves first or the
    time is over.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events until they end or the client leaves; `closed` is then called, whatever
    happened.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], closed: Any, seconds: float):
        super().__init__()
        self._frames, self._closed, self._seconds = frames, closed, seconds
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await until_gone(receive, write(), self._seconds)
        finally:
            self._closed()
