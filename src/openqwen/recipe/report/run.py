"""Read a run folder: its stages in the order of the recipe, and the JSON files of each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openqwen.recipe.artifact import MANIFEST, open_artifact
from openqwen.recipe.graph import GRAPH
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl

EVALUATE = "evaluate-"


@dataclass
class FinishedStage:
    """A finished artifact and its manifest.

    reused: whether the last run reused it; None if that is not recorded. stale: names of inputs
    that have changed since this artifact was made from them.
    """

    name: str
    folder: Path
    manifest: dict[str, Any]
    reused: bool | None = None
    stale: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return float(self.manifest.get("seconds") or 0.0)

    @property
    def digest(self) -> str:
        return str(self.manifest.get("digest", ""))

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of the manifest that identify the artifact."""
        names = {name: name for name in ("kind", "seed", "key", "digest")}
        names |= {"made": "created", "code": "code"}
        values = {name: self.manifest.get(key) for name, key in names.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def inputs(self) -> list[str]:
        """Names of the stages from which it was made, each once."""
        entries = (self.manifest.get("inputs") or {}).values()
        names = dict.fromkeys(entry["stage"] for entry in entries)
        names.pop(self.name, None)  # a folder from outside the run may have this stage's name
        return list(names)

    @property
    def is_evaluation(self) -> bool:
        return self.name.startswith(EVALUATE)

    @property
    def is_model(self) -> bool:
        return (self.folder / "metrics.jsonl").is_file()

    def json(self, name: str) -> Any:
        """Return the content of one of its JSON files, or None if there is no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        """Return the records of one of its JSONL files; none if there is no such file."""
        path = self.folder / name
        return list(read_jsonl(path)) if path.is_file() else []


@dataclass
class Run:
    """A run folder: its name, its stages in order, and how long they took together."""

    folder: Path
    name: str
    stages: list[FinishedStage]

    def __post_init__(self) -> None:
        self._by_name = {stage.name: stage for stage in self.stages}

    def stage(self, name: str) -> FinishedStage | None:
        return self._by_name.get(name)

    def json(self, stage: str, name: str) -> Any:
        """Return the content of a stage's JSON file, or None if stage or file is missing."""
        finished = self.stage(stage)
        return finished.json(name) if finished else None

    def scores(self, stage: str) -> dict[str, Any]:
        """Return the scores of a stage; empty if it was not evaluated."""
        return self.json(EVALUATE + stage, "scores.json") or {}

    def scored(self, key: str) -> dict[str, Any]:
        """Return stage -> this score, for the evaluated stages that have it, in order."""
        values = {name: self.scores(name).get(key) for name in self.evaluated}
        return {name: value for name, value in values.items() if value is not None}

    def first(self, key: str) -> Any:
        """Return this score of the first evaluated stage that has it, or None."""
        return next(iter(self.scored(key).values()), None)

    @property
    def evaluated(self) -> list[str]:
        """Names of the stages that were evaluated, in order."""
        return [stage.name.removeprefix(EVALUATE) for stage in self.stages if stage.is_evaluation]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def load_run(folder: Path) -> Run:
    """Read the finished stages of a run folder.

    An optional `run.json` holds the stages that the last run reused:
    {"reused": ["corpus", ...]}.
    """
    if not folder.is_dir():
        do = f"run a recipe first: {command('run', 'RECIPE')}"
        raise OpenQwenError("There is no such run folder.", where=folder, do=do)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    stages = [
        FinishedStage(name=path.name, folder=path, manifest=_manifest(path))
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path / MANIFEST).is_file()
    ]
    stages = _in_order(stages)
    _mark(stages, record.get("reused"))
    return Run(folder, folder.resolve().name, stages)


def _manifest(folder: Path) -> dict[str, Any]:
    artifact = open_artifact(folder, do=f"run the recipe with --from {folder.name}")
    return artifact.manifest.model_dump(mode="json")


def _in_order(stages: list[FinishedStage]) -> list[FinishedStage]:
    """Sort stages so that inputs come first; otherwise keep the recipe's order."""
    rank = {name: place for place, name in enumerate(name for name, _, _ in GRAPH)}
    waiting = sorted(stages, key=lambda stage: (rank.get(stage.name, len(rank)), stage.name))
    ordered: list[FinishedStage] = []
    while waiting:
        missing = {stage.name for stage in waiting}
        # Damaged manifests may name each other in a circle: then the first one is taken.
        free = (stage for stage in waiting if not missing.intersection(stage.inputs))
        ready = next(free, waiting[0])
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _mark(stages: list[FinishedStage], reused: list[str] | None) -> None:
    """Record which stages were reused, and which inputs of each have changed since it was made."""
    digests = {stage.name: stage.digest for stage in stages}
    changed: set[str] = set()
    for stage in stages:
        stage.reused = None if reused is None else stage.name in reused
        stale = set()
        for entry in (stage.manifest.get("inputs") or {}).values():
            name, digest = entry["stage"], entry["digest"]
            if name in changed or digests.get(name, digest) != digest:
                stale.add(name)
        stage.stale = sorted(stale)
        if stage.stale:
            changed.add(stage.name)
