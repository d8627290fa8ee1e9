"""How the server is run: every field is a flag of `openqwen serve`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.engine import EngineConfig
from openqwen.support.settings import Settings


class ServeConfig(Settings):
    """Secure unless told otherwise: loopback only, closed to other origins, everything limited."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; beyond loopback a key is required of clients",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: list[str] = Field(
        [], description="keys that clients may use; also from OPENQWEN_API_KEY, with commas"
    )
    name: list[str] = Field(
        [], description="names under which clients ask for the model; none: the source's own name"
    )
    adapters: list[str] = Field(
        [],
        description=(
            "LoRA adapters that clients may name in place of the model: NAME=FOLDER, in PEFT's "
            "format"
        ),
    )
    device: str | None = Field(
        None, description="where the model runs; none: a GPU where there is one"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="weights in 8 or 4 bits, packed while loading"
    )
    max_context: str | None = Field(
        None, description="longest prompt and answer in tokens, such as 128k or 1m"
    )
    reward: str | None = Field(None, description="a reward model to serve at /score besides")
    weights: Path | None = Field(
        None, description="folder whose subfolders 1, 2, ... /update_weights may load"
    )
    data: Path | None = Field(
        None, description="folder for files and batches; none: gone when the server ends"
    )
    origin: list[str] = Field(
        [], description="web origins besides our own that may call the API (CORS)"
    )
    max_body: int = Field(16 << 20, gt=0, description="bytes of a request, at most")
    max_files: int = Field(1 << 30, gt=0, description="bytes of all files kept, at most")
    queue: int = Field(
        256,
        gt=0,
        description="answers being made or waited for, at most; more are told to come back",
    )
    timeout: float = Field(600.0, gt=0, description="seconds that one answer may take")
    idle: float = Field(20.0, gt=0, description="seconds that a client may take to send a request")
    drain: float = Field(30.0, ge=0, description="seconds that running answers get after SIGTERM")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engine")
    user: str | None = Field(None, description="unprivileged user to become when started by root")
