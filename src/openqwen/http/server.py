"""Listening, running uvicorn with time limits, and giving up root."""

import asyncio
import logging
import os
import pwd
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from openqwen.http.gate import LOOPBACK, Gate, made_key
from openqwen.http.settings import HttpConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import console


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; OpenQwenError where it is taken or unknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # asyncio sets TCP_NODELAY only where the protocol is given. Without it a small write waits
        # for the acknowledgement of the one before, which clients delay by up to 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        what, where = f"Cannot listen here: {error.strerror or error}.", f"{host}:{port}"
        raise OpenQwenError(what, where, "give another --host or --port") from None
    return listener


def open_url(listener: socket.socket) -> str:
    """The address of a socket, which listens from now on: early clients wait for the server."""
    listener.listen()
    return url_of(listener)


def url_of(listener: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def client_keys(config: HttpConfig) -> list[str]:
    """The keys of clients, from the settings and the environment.

    Where there are none and the server listens beyond loopback, a new one is made and printed.
    """
    keys = [*config.api_key, *filter(None, os.environ.get("OPENQWEN_API_KEY", "").split(","))]
    if key := made_key(config.host, keys):
        keys = [key]
        console.print(f"No API key was given. A new one was made: {key}")
    return keys


def gated(app: ASGIApp, config: HttpConfig, keys: list[str], open_paths: frozenset[str]) -> Gate:
    """The application behind its gate; see `Gate`."""
    hosts = [] if keys else [*LOOPBACK, config.host]
    return Gate(app, keys, hosts, open_paths, config.max_body, config.idle)


def become_user(user: str | None, folder: Path | None) -> None:
    """Change from root to an unprivileged user, who becomes the owner of `folder`.

    Does nothing where the process does not run as root.
    """
    if os.geteuid() != 0:
        return
    if user is None:
        console.print("This server runs as root. --user NAME makes it run as another user.")
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise OpenQwenError(f"There is no user '{user}'.", where="--user") from None
    if folder:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in [folder, *folder.iterdir()]:
            os.chown(path, entry.pw_uid, entry.pw_gid)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    if not os.access(os.__file__, os.R_OK):
        what, do = f"'{user}' may not read this Python.", "install it where all users may read it"
        raise OpenQwenError(what, where=os.__file__, do=do)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a time limit on a request's headers."""

    seconds = 20.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """A client has sent bytes; the time starts with the first bytes of a request."""
        waiting = self._between_requests()
        super().data_received(data)
        if waiting and self._between_requests():
            self._start_timer()

    def _between_requests(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._time_over)

    def _time_over(self) -> None:
        self._timer = None
        if self.cycle is None or (self.cycle.response_complete and self.conn.trailing_data[0]):
            self.transport.close()


def uvicorn_server(app: ASGIApp, idle: float, drain: float) -> uvicorn.Server:
    """A server for `run`.

    Args:
        app: the application, behind its `Gate`.
        idle: seconds that a client may take to send a request's headers.
        drain: seconds that running requests get after SIGTERM.
    """
    TimedProtocol.seconds = idle
    settings: dict[str, Any] = {
        "http": TimedProtocol,
        "ws": "none",
        "log_level": "warning",
        "server_header": False,
        "timeout_graceful_shutdown": max(round(drain), 1),
        "timeout_keep_alive": max(round(idle), 1),
    }
    return uvicorn.Server(uvicorn.Config(app, **settings))


def serve_app(
    app: ASGIApp,
    config: HttpConfig,
    listener: socket.socket,
    keys: list[str],
    open_paths: frozenset[str],
) -> None:
    """Serve an application behind its gate until SIGTERM or SIGINT."""
    server = uvicorn_server(gated(app, config, keys, open_paths), config.idle, config.drain)
    asyncio.run(run(server, listener))


async def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    # asyncio warns where a client left while a response was written to it, which is normal.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # uvicorn raises the signal once more after it has drained; by default that ends the process.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with suppress(KeyboardInterrupt):
        await server.serve([listener])
