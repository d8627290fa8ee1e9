"""`openqwen serve MODEL`: load the model, listen, answer requests, and drain before the end."""

import asyncio
import gc
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from openqwen.engine import Engine
from openqwen.http.server import (
    become_user,
    client_keys,
    gated,
    listen,
    run,
    url_of,
    uvicorn_server,
)
from openqwen.model import load_model, load_scorer
from openqwen.model.kernels import library as kernels_library
from openqwen.model.long_context import context_tokens, describe
from openqwen.model.quantize import QuantizedQwen2
from openqwen.serve.api import Api
from openqwen.serve.app import application, page
from openqwen.serve.batches import Batches
from openqwen.serve.bridge import Bridge
from openqwen.serve.metrics import Metrics
from openqwen.serve.settings import ServeConfig
from openqwen.support.device import best_device, tf32
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import console
from openqwen.tokenizer import load_tokenizer


def serve(source: str, config: ServeConfig) -> None:
    """Serve a model until SIGTERM or SIGINT."""
    # Before the model is loaded, so that an address in use is reported at once.
    listener = listen(config.host, config.port)
    keys = client_keys(config)
    names = config.name or [Path(source).name if Path(source).exists() else source]
    engine = _engine(source, config, names)
    scorer = None
    if config.reward is not None:
        scorer = load_scorer(config.reward, device=engine.model.device)
    become_user(config.user, config.data)

    def start(on_failure: Callable[[], None]) -> Api:
        metrics = Metrics(names[0])
        bridge = Bridge(engine, metrics, config.queue, config.timeout, on_failure)
        return Api(bridge, config, names, scorer)

    with tempfile.TemporaryDirectory(prefix="openqwen-") as private, tf32(True):
        failed = asyncio.run(_serve(start, source, keys, listener, config.data or Path(private)))
    if failed:
        do = "report the traceback above with the request"
        raise OpenQwenError("The engine has failed.", do=do)


async def _serve(
    start: Callable[[Callable[[], None]], Api],
    source: str,
    keys: list[str],
    listener: socket.socket,
    folder: Path,
) -> bool:
    """Serve; returns whether the engine failed.

    start: starts the engine's thread, which needs the event loop to run; its argument is called
    when the engine fails. folder: for files and batches.
    """

    def on_failure() -> None:
        server.should_exit = True

    api = start(on_failure)
    config, batches = api.config, Batches(folder, api.config.max_files)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batches.run(api))
        gc.freeze()  # garbage collections between tokens need not look at what is loaded
        console.print(_summary(api, keys, listener, source))
        yield
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    app: Any = application(api, batches, lifespan)
    app = gated(app, config, keys, page().paths | {"/health"})
    if config.origin:
        methods = ["GET", "POST", "DELETE"]
        app = CORSMiddleware(app, config.origin, allow_methods=methods, allow_headers=["*"])
    server = uvicorn_server(app, config.idle, config.drain)
    await run(server, listener)
    api.bridge.stop()
    return api.bridge.fault is not None


def _engine(source: str, config: ServeConfig, names: list[str]) -> Engine:
    settings = config.engine
    if config.max_context is not None:
        settings = settings.model_copy(update={"max_context": context_tokens(config.max_context)})
    model = load_model(source, device=config.device or best_device(), quantize=config.quantize)
    engine = Engine(model, load_tokenizer(source), settings)
    for entry in config.adapters:
        name, _, folder = entry.partition("=")
        if not name or not folder or name in [*names, *engine.adapters.names]:
            what, do = f"'{entry}' is not an adapter.", "give NAME=FOLDER, with a name not yet used"
            raise OpenQwenError(what, where="--adapters", do=do)
        engine.adapters.add(name, folder)
    return engine


def _summary(api: Api, keys: list[str], listener: socket.socket, source: str) -> str:
    """The line printed when the server is ready; it ends with the URL."""
    model = api.bridge.engine.model
    numbers = str(model.dtype).removeprefix("torch.")
    if isinstance(model, QuantizedQwen2):
        numbers = model.kind
    elif numbers == "float32" and str(model.device).startswith("cuda"):
        numbers += " (products in TF32)"
    kernels = "compiled kernels" if kernels_library() else "plain PyTorch"
    context = f"context {api.max_context:,}"
    if api.config.max_context is not None:
        context = describe(model.config, api.max_context)
    key = "key needed" if keys else "no key needed"
    where = f"{kernels} on {model.device}"
    return "; ".join([f"{api.names[0]} ({source})", numbers, where, context, key, url_of(listener)])
