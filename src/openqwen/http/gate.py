"""Checks that every request passes before the application sees it: host, key, size, time."""

import asyncio
import hmac
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openqwen.http.errors import ApiError, new_id

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
Headers = dict[bytes, bytes]


def made_key(host: str, keys: Sequence[str]) -> str | None:
    """A new random key where a server would otherwise listen beyond loopback without one."""
    return None if keys or host in LOOPBACK else secrets.token_urlsafe(32)


class Gate:
    """ASGI middleware that checks host, key, body size and time, and adds security headers.

    The whole body is read before the application is called.

    Args:
        app: the application behind the gate.
        keys: API keys that clients may use; none: no key is needed.
        hosts: values of the Host header that are accepted; none: all. The check stops web pages
            that let their own name point to 127.0.0.1 (DNS rebinding).
        open_paths: paths that need no key.
        limit: largest body, in bytes.
        idle: seconds within which the body must have come.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Sequence[str],
        open_paths: frozenset[str],
        limit: int,
        idle: float,
    ):
        self._app, self._open_paths = app, open_paths
        self._keys = [key.encode() for key in keys]
        self._hosts = [host.lower() for host in hosts]
        self._limit, self._idle = limit, idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers: Headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id") or new_id("req").encode()
        if scope["method"] == "HEAD":  # the HTTP server leaves the body out
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                added = [*_HEADERS, (b"x-request-id", request_id)]
                missing = [header for header in added if header[0] not in present]
                message["headers"] = [*message["headers"], *missing]
            await send(message)

        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            self._check_body(headers)
            body = await self._read(receive)
        except ApiError as error:
            return await error.response()(scope, receive, send_with_headers)
        if body is None:
            return None
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        return await self._app(scope, receive_again, send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name, _, port = host.rpartition(":")
        if self._hosts and (name if name and port.isdigit() else host) not in self._hosts:
            message = "This server does not answer to this Host header."
            raise ApiError(403, message, code="host_not_allowed")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in self._open_paths:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        bearer = scheme.lower() == b"bearer"
        key = token.strip() if bearer else headers.get(b"x-api-key", b"")
        # Each key is compared, so that the time does not depend on which one matches.
        if not sum(hmac.compare_digest(key, known) for known in self._keys):
            message = "No valid API key; send Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")

    def _check_body(self, headers: Headers) -> None:
        if int(headers.get(b"content-length", b"0")) > self._limit:
            raise self._too_large()
        coding = headers.get(b"content-encoding", b"").decode("latin-1")
        if coding.lower() not in ("", "identity"):
            message = f"This body is compressed ({coding}); send it uncompressed."
            raise ApiError(400, message, "Content-Encoding")

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has disconnected."""
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._idle):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._limit:
                        raise self._too_large()
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"The body did not arrive within {self._idle:g} seconds."
            raise ApiError(408, late) from None
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than {self._limit} bytes."
        return ApiError(413, message, code="body_too_large")
