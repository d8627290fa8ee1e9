"""Artifacts: folders with a payload and a manifest that says what they were made from and how."""

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
from openqwen.recipe.ranks import run_stage
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, read_json, replace_folder, sha256, write_json
from openqwen.support.hub import HUB, pinned
from openqwen.support.records import data_files
from openqwen.support.settings import Settings
from openqwen.support.stage import StageRun

MANIFEST = "manifest.json"

# These files hold measured times (tokens per second) and differ between equal runs. They are
# checked for damage, but no later stage depends on them.
LOGS = frozenset({"metrics.jsonl"})

_SOURCES = {".py", ".toml", ".json", ".jinja"}
_HASH_UP_TO = 2**30  # bytes; for larger files only the size is checked, unless `thorough`


class FileEntry(BaseModel):
    """One file of the payload."""

    bytes: int
    sha256: str


class InputEntry(BaseModel):
    """An input: the stage that made it or the path it came from, and the digest of its content."""

    stage: str
    digest: str


class Manifest(Settings):
    """What an artifact is; `key`: hash of what it depends on, `digest`: hash of its payload."""

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
    """An input of a stage: its path, and its entry in the manifest."""

    path: Path
    entry: InputEntry


def artifact_key(node: Node, seed: int, digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything an artifact depends on; digests: role -> input's digest."""
    parts = {
        "stage": node.name,
        "kind": node.stage.name,
        "config": node.config.model_dump(mode="json"),
        "seed": seed,
        "inputs": dict(digests),
        "version": version(),
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def open_artifact(folder: Path, do: str) -> Artifact:
    """Read the manifest of a finished artifact; do: the advice of the error if that fails."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate(read_json(path))
    except OpenQwenError as error:
        raise OpenQwenError(f"This artifact is damaged: {error.what}", where=path, do=do) from None
    except ValidationError as error:
        what = f"This manifest is damaged: {error.errors()[0]['msg']}."
        raise OpenQwenError(what, where=path, do=do) from None
    return Artifact(folder, manifest)


def verify(artifact: Artifact, do: str, thorough: bool = False) -> None:
    """Raise an error unless every file has the size and content that the manifest states."""
    for name, entry in artifact.manifest.files.items():
        path = artifact.folder / name
        fault = _fault(path, entry, thorough)
        if fault is not None:
            what = f"The artifact of '{artifact.manifest.stage}' is damaged: {fault}."
            raise OpenQwenError(what, where=path, do=do)


def _fault(path: Path, entry: FileEntry, thorough: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{path.name} has {size:,} bytes, but {entry.bytes:,} were written"
    if size <= _HASH_UP_TO or thorough:
        actual = sha256(path)
        if actual != entry.sha256:
            return f"{path.name} has sha256 {actual[:12]}…, but {entry.sha256[:12]}… was written"
    return None


def make(
    node: Node, sources: Mapping[str, Source], seed: int, key: str, work: Path, target: Path
) -> Artifact:
    """Run a stage in the folder `work`, then rename its artifact to `target`.

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
    entries = {}
    for name, path in _payload(folder):
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
    return entries


def _payload(folder: Path) -> list[tuple[str, Path]]:
    """Return (relative name, path) of every file but the manifest, sorted by name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    return [(name, path) for name, path in files if name != MANIFEST]


def _digest(hashes: Mapping[str, str]) -> str:
    lines = [f"{hashes[name]}  {name}\n" for name in sorted(hashes) if name not in LOGS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """Return the digest of a file's or folder's content; for an artifact it is `Manifest.digest`.

    For files over 1 GB, size and time of change are hashed instead of the content.
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
    """Return an input that no stage of this run made: a file, a folder or a data set of the hub."""
    if str(path).startswith(HUB):
        path = Path(pinned(str(path)))
        digest = _digest({str(n): _hash(file) for n, file in enumerate(data_files(path))})
        return Source(path, InputEntry(stage=str(path), digest=digest))
    if not path.exists():
        raise OpenQwenError(f"The input '{role}' does not exist.", where=path, do="check the path")
    return Source(path, InputEntry(stage=str(path), digest=content_digest(path)))


def recover(store: Path) -> None:
    """Finish or undo the last step of `make` where a kill interrupted it."""
    for old in store.glob(".*.old"):
        target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _start_clock(work: Path, scratch: Path) -> float:
    """Start the clock, and return the seconds of killed attempts that the saved state contains.

    Of each attempt, the time from its start to its last save counts.
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
    """Return when a file in the scratch folder last changed (Unix time), or None without files."""
    files = (path for path in scratch.rglob("*") if path.is_file())
    return max((path.stat().st_mtime for path in files), default=None)


@functools.cache
def version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("openqwen")


@functools.cache
def code_digest() -> str:
    """Return the SHA-256 of the package's Python sources and of the data files that they read."""
    root = Path(str(openqwen.__file__)).parent
    sources = [path for path in root.rglob("*") if path.suffix in _SOURCES]
    return _digest({path.relative_to(root).as_posix(): sha256(path) for path in sources})


def machine() -> dict[str, Any]:
    """Describe the machine and its libraries, for the manifest."""
    # torch takes seconds to import, so its settings are read only if the stage has imported it.
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
