"""`openqwen serve MODEL`: load, listen, answer, and leave without dropping anybody."""

import asyncio
import gc
import logging
import os
import pwd
import secrets
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from openqwen.engine import Engine
from openqwen.model import load_model, load_scorer
from openqwen.model.kernels import library as kernels_library
from openqwen.model.long_context import context_tokens, describe
from openqwen.model.quantize import QuantizedQwen2
from openqwen.serve.api import Api
from openqwen.serve.app import application, page
from openqwen.serve.batches import Batches
from openqwen.serve.bridge import Bridge
from openqwen.serve.gate import Gate, TimedProtocol
from openqwen.serve.metrics import Metrics
from openqwen.serve.settings import ServeConfig
from openqwen.support.device import best_device, tf32
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import console
from openqwen.tokenizer import load_tokenizer

Begin = Callable[
    [Callable[[], None]], Api
]  # starts the engine's thread, from within the event loop
_LOOPBACK = ["localhost", "127.0.0.1", "::1", "[::1]"]


def serve(source: str, config: ServeConfig) -> None:
    """Serve a model until SIGTERM or SIGINT."""
    listener = _listen(
        config.host, config.port
    )  # a port that is taken is found out before the model is loaded
    keys = [*config.api_key, *filter(None, os.environ.get("OPENQWEN_API_KEY", "").split(","))]
    if not keys and config.host not in _LOOPBACK:
        keys = [secrets.token_urlsafe(32)]
        console.print(f"No key was given, so one was made: {keys[0]}")
    names = config.name or [Path(source).name if Path(source).exists() else source]
    engine = _engine(source, config, names)
    scorer = (
        None if config.reward is None else load_scorer(config.reward, device=engine.model.device)
    )
    _become(config.user, config.data)

    def begin(failed: Callable[[], None]) -> Api:
        return Api(
            Bridge(engine, Metrics(names[0]), config.queue, config.timeout, failed),
            config,
            names,
            scorer,
        )

    with tempfile.TemporaryDirectory(prefix="openqwen-") as private, tf32(True):
        failed = asyncio.run(_run(begin, source, keys, listener, config.data or Path(private)))
    if failed:
        raise OpenQwenError(
            "The engine has failed.", do="report the traceback above with the request"
        )


async def _run(
    begin: Begin, source: str, keys: list[str], listener: socket.socket, folder: Path
) -> bool:
    """Serve; returns whether the engine failed."""
    server: uvicorn.Server

    def failed() -> None:
        server.should_exit = True

    api = begin(failed)
    config, batches = api.config, Batches(folder, api.config.max_files)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batches.run(api))
        gc.freeze()  # what is loaded stays: collections need not look at it between tokens
        _say(api, keys, listener, source)
        yield
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    app: Any = application(api, batches, lifespan)
    hosts = [] if keys else [*_LOOPBACK, config.host]
    app = Gate(app, keys, hosts, frozenset({"/health", *page()}), config.max_body, config.idle)
    if config.origin:
        app = CORSMiddleware(
            app, config.origin, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    TimedProtocol.seconds = config.idle
    logging.getLogger("asyncio").setLevel(
        logging.ERROR
    )  # a client that left while it was written to is no news
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # uvicorn raises it once more when it has drained
    settings: dict[str, Any] = {
        "http": TimedProtocol,
        "ws": "none",
        "log_level": "warning",
        "server_header": False,
    }
    settings["timeout_graceful_shutdown"] = max(round(config.drain), 1)
    settings["timeout_keep_alive"] = max(round(config.idle), 1)
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    with suppress(KeyboardInterrupt):
        await server.serve([listener])
    api.bridge.stop()
    return api.bridge.fault is not None


def _engine(source: str, config: ServeConfig, names: list[str]) -> Engine:
    settings = config.engine
    if config.max_context is not None:
        settings = settings.model_copy(update={"max_context": context_tokens(config.max_context)})
    device = config.device or best_device()
    engine = Engine(
        load_model(source, device=device, quantize=config.quantize),
        load_tokenizer(source),
        settings,
    )
    for entry in config.adapters:
        name, _, folder = entry.partition("=")
        if not name or not folder or name in [*names, *engine.adapters.names]:
            do = "give NAME=FOLDER, with a name that nothing else here has"
            raise OpenQwenError(
                f"An adapter cannot be given as '{entry}'.", where="--adapters", do=do
            )
        engine.adapters.add(name, folder)
    return engine


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        message = f"Cannot listen there: {error.strerror or error}."
        raise OpenQwenError(
            message, where=f"{host}:{port}", do="give another --host or --port"
        ) from None
    return listener


def _become(user: str | None, folder: Path | None) -> None:
    """From root to the unprivileged user, to whom the folder of files is given."""
    if os.geteuid() != 0:
        return
    if user is None:
        console.print("This runs as root; --user NAME makes it run as somebody who may do less.")
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
        raise OpenQwenError(
            f"'{user}' may not read this Python.", where=os.__file__, do="install it for everybody"
        )


def _say(api: Api, keys: list[str], listener: socket.socket, source: str) -> None:
    (host, port), model = listener.getsockname()[:2], api.bridge.engine.model
    form = (
        model.kind if isinstance(model, QuantizedQwen2) else str(model.dtype).removeprefix("torch.")
    )
    if form == "float32" and str(model.device).startswith("cuda"):
        form += " (products in TF32)"
    kernels = "compiled kernels" if kernels_library() else "plain PyTorch"
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    chosen = api.config.max_context is not None
    context = describe(model.config, api.max_context) if chosen else f"context {api.max_context:,}"
    parts = [f"{api.names[0]} ({source})", form, f"{kernels} on {model.device}", context]
    console.print("; ".join([*parts, "key needed" if keys else "no key needed", where]))
