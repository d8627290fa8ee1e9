"""Settings of the server: each field is a flag of `openqwen serve`."""

from pathlib import Path

from pydantic import Field

from openqwen.engine import EngineConfig
from openqwen.http.settings import HttpConfig
from openqwen.sandbox import Tier
from openqwen.support.settings import Quantization


class ServeConfig(HttpConfig):
    """The defaults are safe: loopback only, no other web origins, and a limit on everything."""

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
    quantize: Quantization | None = Field(
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
    max_files: int = Field(1 << 30, gt=0, description="most bytes of all uploaded files together")
    queue: int = Field(
        256,
        gt=0,
        description="most answers in progress or waiting; further requests get status 429",
    )
    timeout: float = Field(600.0, gt=0, description="time limit of one answer, in seconds")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engine")


class SandboxConfig(HttpConfig):
    """What `openqwen sandbox --serve` offers. The defaults are safe, as those of `serve`."""

    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0: any free port")
    workers: int | None = Field(
        None, ge=1, description="programs at a time; default: one for each core"
    )
    tier: Tier = Field("strict", description="the least protection; see `openqwen sandbox --check`")
    packages: list[str] = Field(
        [], description="installed modules that programs may import, such as numpy"
    )
    queue: int = Field(
        64, gt=0, description="most programs running or waiting; further ones get status 429"
    )
    max_seconds: float = Field(
        60.0, gt=0, description="largest time limit that clients may ask for"
    )
    max_memory_mb: int = Field(4096, gt=0, description="largest memory that clients may ask for")
