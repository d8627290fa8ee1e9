"""Settings that all methods of synthesis share, and the generators that they name."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.engine import Endpoint, EngineConfig, Generator
from openqwen.engine.workers import EngineSource, EngineWorkers
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.support.settings import Quantization, Settings
from openqwen.support.workers import WorkersConfig, WorkKind


class EndpointConfig(Settings):
    """A server with OpenAI's API: ours, vLLM, SGLang, llama.cpp or a hosted one."""

    url: str = Field("", description="its base URL, such as http://127.0.0.1:8000/v1")
    name: str = Field("", description="the model's name at the server")
    timeout: float = Field(600.0, gt=0, description="most seconds of one attempt")
    retries: int = Field(6, ge=0, description="most attempts of a request after the first")


class SynthesisLimits(Settings):
    """How fast a run goes and when it stops. What it makes does not depend on these.

    A run that stops at a limit keeps its finished calls and items: the same command with a higher
    limit goes on from there.
    """

    concurrency: int = Field(16, ge=1, description="most requests at once")
    rate: float | None = Field(None, gt=0, description="most requests sent in a minute")
    requests: int | None = Field(None, ge=1, description="most requests")
    tokens: int | None = Field(None, ge=1, description="most tokens of prompts and answers")
    errors: int = Field(100, ge=0, description="most failed requests and items")
    calls: Path | None = Field(
        None,
        description="a file that keeps finished calls for other runs too; by default they are "
        "kept until the stage is finished",
    )


class SynthesisConfig(Settings):
    """What all methods of synthesis need."""

    model: Path | None = Field(
        None, description="the model: a Hugging Face folder, a .gguf file or a hub id"
    )
    quantize: Quantization | None = Field(
        None, description="quantise the weights when they are loaded"
    )
    engine: WorkKind = Field(
        "single",
        exclude=True,  # as the limits: what a run makes does not depend on it
        description="where the model runs: in this process, in several, or on a Ray cluster",
    )
    workers: WorkersConfig = Field(
        default_factory=WorkersConfig,
        exclude=True,
        description="the processes of --engine processes and ray",
    )
    endpoint: EndpointConfig = Field(
        default_factory=EndpointConfig, description="a server in place of the model"
    )
    judge: EndpointConfig = Field(
        default_factory=EndpointConfig, description="a server that judges in place of the model"
    )
    prompts: Path | None = Field(
        None, description="a folder of prompt files; each replaces the shipped one of its name"
    )
    language: Literal["en", "zh"] = Field("en", description="language of the prompts")
    most_items: int | None = Field(None, ge=1, description="use the first so many of the items")
    limits: SynthesisLimits = Field(
        default_factory=SynthesisLimits,
        exclude=True,  # not in the artifact's key: a higher limit continues the same run
        description="how fast the run goes, and when it stops",
    )


def open_generators(
    config: SynthesisConfig, inputs: Mapping[str, Path]
) -> dict[str, tuple[Generator, str, str]]:
    """The generators by name: each with its model's name and an identity for the log of calls.

    Raises:
        OpenQwenError: no model, or both a model and a server, are named.
    """
    given = inputs.get("model") or config.model
    if (given is None) != bool(config.endpoint.url):
        what = "Name a model or a server." if given is None else "A model and a server are named."
        do = "give --model FOLDER, or --endpoint.url URL and --endpoint.name NAME"
        raise OpenQwenError(what, "model, endpoint", do)
    if given is None and config.engine != "single":
        what = "Workers need a model that they can load, not a server."
        raise OpenQwenError(what, f"engine {config.engine}", "give --model in place of --endpoint")
    generators = {}
    if given is None:
        generators["model"] = _server(config.endpoint, config.limits.concurrency)
    else:
        generators["model"] = _engine(local(given), config)
    generators["judge"] = generators["model"]
    if config.judge.url:
        generators["judge"] = _server(config.judge, config.limits.concurrency)
    return generators


def _server(config: EndpointConfig, concurrency: int) -> tuple[Generator, str, str]:
    endpoint = Endpoint(
        config.url,
        config.name,
        concurrency=concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )
    return endpoint, config.name, f"{endpoint.url} {config.name}"


def _engine(path: Path, config: SynthesisConfig) -> tuple[Generator, str, str]:
    most = config.limits.concurrency
    source = EngineSource(path, config.quantize, EngineConfig(max_running=most))
    engine: Generator
    if config.engine == "single":
        engine = source.load()
    else:
        engine = EngineWorkers(source, config.engine, config.workers, most)
    return engine, path.name, _identity(path, config.quantize)


def _identity(path: Path, quantize: str | None) -> str:
    """A text that changes when the model's files do: their names, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parts = [str(quantize)]
    for file in files:
        status = os.stat(file)
        parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
