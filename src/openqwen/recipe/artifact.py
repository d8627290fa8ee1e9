"""An artifact is a folder with a payload and a manifest that says what it is, from what, and how it
came to be.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

import openqwen
from openqwen.recipe.graph import Node
from openqwen.recipe.together import run_stage
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, read_json, replace_folder, sha256, write_json
from openqwen.support.hub import HUB, pinned
from openqwen.support.records import data_files
from openqwen.support.settings import Settings
from openqwen.support.stage import StageRun

MANIFEST = "manifest.json"

# Their bytes hold the clock (tokens per second), so they are checked for damage but no later stage
# depends on them.
LOGS = frozenset({"metrics.jsonl"})

_SOURCES = {".py", ".toml", ".json", ".jinja"}
_HASH_UP_TO = 2**30  # bytes; of larger files only the size is checked, unless `thorough`


class FileEntry(BaseModel):
    """One file of the payload."""

    bytes: int
    sha256: str


class InputEntry(BaseModel):
    """What one input was: the stage that made it, or the path it came from, and the digest of its
    content.
    """

    stage: str
    digest: str


class Manifest(Settings):
    """The label of an artifact; `key` is what it depends on, `digest` what it holds."""

    stage: str
    kind: str
    key: str
    digest: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, InputEntry]
    files: dict[str, FileEntry]
    code: dict[str, str]
    machine: dict[str, Any]
    created: datetime
    seconds: float
    metrics: dict[str, int | float | None]


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Source:
    """An input as a stage gets it: where it lies, and its line in the manifest."""

    path: Path
    entry: InputEntry


def artifact_key(node: Node, seed: int, digests: Mapping[str, str]) -> str:
    """SHA-256 over everything the artifact depends on; digests: role -> content of that input."""
    parts = {
        "stage": node.name,
        "kind": node.stage.name,
        "config": node.config.model_dump(mode="json"),
        "seed": seed,
        "inputs": dict(digests),
        "version": version(),
    }
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def open_artifact(folder: Path, do: str) -> Artifact:
    """Read the manifest of a finished artifact; `do` is the advice if it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path))
    except OpenQwenError as error:
        raise OpenQwenError(f"This artifact is damaged: {error.what}", where=path, do=do) from None
    except ValidationError as error:
        raise OpenQwenError(
            f"This manifest is damaged: {error.errors()[0]['msg']}.", where=path, do=do
        ) from None
    return Artifact(folder, manifest)


def verify(artifact: Artifact, do: str, thorough: bool = False) -> None:
    """Raise unless every file is there with the size and content that the manifest says."""
    for name, entry in artifact.manifest.files.items():
        path = artifact.folder / name
        fault = _fault(path, entry, thorough)
        if fault is not None:
            raise OpenQwenError(
                f"The artifact of '{artifact.manifest.stage}' is damaged: {fault}.",
                where=path,
                do=do,
            )


def _fault(path: Path, entry: FileEntry, thorough: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{path.name} has {size:,} bytes, but {entry.bytes:,} were written"
    if size <= _HASH_UP_TO or thorough:
        found = sha256(path)
        if found != entry.sha256:
            return f"{path.name} has sha256 {found[:12]}…, but {entry.sha256[:12]}… was written"
    return None


def make(
    node: Node, sources: Mapping[str, Source], seed: int, key: str, work: Path, target: Path
) -> Artifact:
    """Run a stage aside in `work`, then put its artifact at `target`, replacing what stands there
    only at the end.

    A kill at any point leaves either the old `target` or the new one (see `recover`), and the
    scratch folder in `work`.
    """
    output = fresh_folder(work / "output")
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    before = _start_clock(work, scratch)
    started = time.monotonic()
    paths = {role: source.path for role, source in sources.items()}
    metrics = run_stage(node.stage, StageRun(node.config, paths, output, scratch, seed, node.name))
    files = _entries(output)
    manifest = Manifest(
        stage=node.name,
        kind=node.stage.name,
        key=key,
        digest=_digest({name: entry.sha256 for name, entry in files.items()}),
        seed=seed,
        config=node.config.model_dump(mode="json"),
        inputs={role: source.entry for role, source in sources.items()},
        files=files,
        code={"version": version(), "digest": code_digest()},
        machine=machine(),
        created=datetime.now().astimezone(),
        seconds=round(before + time.monotonic() - started, 2),
        metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
    )
    write_json(output / MANIFEST, manifest.model_dump(mode="json"))
    replace_folder(output, target)
    shutil.rmtree(work, ignore_errors=True)
    return Artifact(target, manifest)


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for name, path in _payload(folder)
    }


def _payload(folder: Path) -> list[tuple[str, Path]]:
    """Every file under a folder but its manifest, as (relative name, path), in one fixed order."""
    files = {
        str(path.relative_to(folder).as_posix()): path
        for path in folder.rglob("*")
        if path.is_file()
    }
    return [(name, files[name]) for name in sorted(files) if name != MANIFEST]


def _digest(hashes: Mapping[str, str]) -> str:
    lines = [f"{hashes[name]}  {name}\n" for name in sorted(hashes) if name not in LOGS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """The digest of a file's or folder's content; an artifact's own digest if it is one.

    Of files over 1 GB, size and time of change stand in for the content.
    """
    if path.is_file():
        return _hash(path)
    return _digest({name: _hash(file) for name, file in _payload(path)})


def _hash(path: Path) -> str:
    status = path.stat()
    if status.st_size <= _HASH_UP_TO:
        return sha256(path)
    return hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()


def outside_source(path: Path, role: str) -> Source:
    """A file, a folder or a data set on the hub that no stage of this run made, as an input."""
    if str(path).startswith(HUB):
        path = Path(pinned(str(path)))
        digest = _digest({str(n): _hash(file) for n, file in enumerate(data_files(path))})
        return Source(path, InputEntry(stage=str(path), digest=digest))
    if not path.exists():
        raise OpenQwenError(f"The input '{role}' does not exist.", where=path, do="check the path")
    return Source(path, InputEntry(stage=str(path), digest=content_digest(path)))


def recover(store: Path) -> None:
    """Finish or undo what a kill in the middle of `make`'s last step left behind."""
    for old in store.glob(".*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _start_clock(work: Path, scratch: Path) -> float:
    """Seconds that killed attempts put into the saved state: each from its start to its last
    save.
    """
    clock = work / "clock.json"
    before = 0.0
    saved = last_save(scratch)
    if saved is not None and clock.exists():
        former = read_json(clock)
        before = former["before"] + max(0.0, saved - former["started"])
    write_json(clock, {"before": before, "started": time.time()})
    return before


def last_save(scratch: Path) -> float | None:
    """When a file under the scratch folder last changed (seconds of the epoch), None where there is
    no file.
    """
    return max(
        (path.stat().st_mtime for path in scratch.rglob("*") if path.is_file()), default=None
    )


@functools.cache
def version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("openqwen")


@functools.cache
def code_digest() -> str:
    """SHA-256 over the package's Python sources and the data files that they read."""
    root = Path(str(openqwen.__file__)).parent
    sources = [path for path in root.rglob("*") if path.suffix in _SOURCES]
    return _digest({path.relative_to(root).as_posix(): sha256(path) for path in sources})


def machine() -> dict[str, Any]:
    """On what an artifact was made.

    A stage that never loaded torch is not charged with loading it here.
    """
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages * page / 1e9, 1),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch is not None and cuda else "cpu",
        "threads": torch.get_num_threads() if torch is not None else 1,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
