"""Settings of the server: each field is a flag of `openqwen serve`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.engine import EngineConfig
from openqwen.support.settings import Settings


class ServeConfig(Settings):
    """The defaults are safe: loopback only, no other web origins, and a limit on everything."""

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; beyond loopback, clients need an API key",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    api_key: list[str] = Field(
        [],
        description="API keys that clients may use; more may be given in OPENQWEN_API_KEY, "
        "separated by commas",
    )
    name: list[str] = Field(
        [], description="names by which clients ask for the model; default: the source's name"
    )
    adapters: list[str] = Field(
        [],
        description="LoRA adapters in PEFT's format, as NAME=FOLDER; clients send NAME as model",
    )
    device: str | None = Field(
        None, description="device of the model; default: a GPU where there is one"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="weights in 8 or 4 bits, quantized while loading"
    )
    max_context: str | None = Field(
        None, description="most tokens of prompt and answer together, such as 128k or 1m"
    )
    reward: str | None = Field(None, description="a reward model, served at /score")
    weights: Path | None = Field(
        None, description="folder whose subfolders 1, 2, ... /update_weights may load"
    )
    data: Path | None = Field(
        None, description="folder for files and batches; default: a temporary one"
    )
    origin: list[str] = Field(
        [], description="other web origins whose pages may call the API (CORS)"
    )
    max_body: int = Field(16 << 20, gt=0, description="largest request, in bytes")
    max_files: int = Field(1 << 30, gt=0, description="most bytes of all uploaded files together")
    queue: int = Field(
        256,
        gt=0,
        description="most answers in progress or waiting; further requests get status 429",
    )
    timeout: float = Field(600.0, gt=0, description="time limit of one answer, in seconds")
    idle: float = Field(
        20.0, gt=0, description="seconds that a client may take to send its request"
    )
    drain: float = Field(30.0, ge=0, description="seconds that running answers get after SIGTERM")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engine")
    user: str | None = Field(None, description="unprivileged user to become when started as root")
