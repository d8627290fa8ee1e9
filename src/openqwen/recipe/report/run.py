"""Reading a run folder: its stages in the order of the recipe, and the JSON that each left
behind.
"""

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
    """One finished artifact and what its manifest says.

    reused: whether the last run found it already made; None where the run left no record of that.
    stale: names of inputs that have been made anew since this artifact was built from them.
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
        """What identifies the artifact, for showing."""
        names = {
            "kind": "kind",
            "seed": "seed",
            "key": "key",
            "digest": "digest",
            "made": "created",
            "code": "code",
        }
        return {
            name: self.manifest[key]
            for name, key in names.items()
            if self.manifest.get(key) is not None
        }

    @property
    def inputs(self) -> list[str]:
        """Names of the stages it was made from, each once."""
        named = (self.manifest.get("inputs") or {}).values()
        # A folder from outside may bear its name.
        return list(dict.fromkeys(given["stage"] for given in named if given["stage"] != self.name))

    @property
    def is_evaluation(self) -> bool:
        return self.name.startswith(EVALUATE)

    @property
    def is_model(self) -> bool:
        return (self.folder / "metrics.jsonl").is_file()

    def json(self, name: str) -> Any:
        """The value in one of its JSON files, or None where it has no such file."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        """The records of one of its JSONL files; none where it has no such file."""
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
        """A stage's JSON file, or None where the stage or the file is missing."""
        found = self.stage(stage)
        return found.json(name) if found else None

    def scores(self, stage: str) -> dict[str, Any]:
        """What the evaluation of a stage wrote; empty where it was not evaluated."""
        return self.json(EVALUATE + stage, "scores.json") or {}

    def scored(self, key: str) -> dict[str, Any]:
        """This score of every evaluated stage that has it, in order."""
        values = {name: self.scores(name).get(key) for name in self.evaluated}
        return {name: value for name, value in values.items() if value is not None}

    def first(self, key: str) -> Any:
        """This score of the first evaluated stage that has it, or None."""
        return next(iter(self.scored(key).values()), None)

    @property
    def evaluated(self) -> list[str]:
        """Names of the stages that were evaluated, in order."""
        return [stage.name.removeprefix(EVALUATE) for stage in self.stages if stage.is_evaluation]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def load_run(folder: Path) -> Run:
    """Find the finished stages of a run folder.

    An optional `run.json` names the recipe and the stages that the last run reused:
    {"recipe": "tiny", "reused": ["corpus", ...]}.
    """
    if not folder.is_dir():
        do = f"run a recipe first: {command('run', 'RECIPE')}"
        raise OpenQwenError("There is no run folder here.", where=folder, do=do)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    stages = [
        FinishedStage(name=path.name, folder=path, manifest=_manifest(path))
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path / MANIFEST).is_file()
    ]
    stages = _in_order(stages)
    _mark(stages, record.get("reused"))
    return Run(folder, record.get("recipe") or folder.resolve().name, stages)


def _manifest(folder: Path) -> dict[str, Any]:
    artifact = open_artifact(folder, do=f"run the recipe with --from {folder.name}")
    return artifact.manifest.model_dump(mode="json")


def _in_order(stages: list[FinishedStage]) -> list[FinishedStage]:
    """Inputs before what is made from them; among equals, the recipe's order."""
    rank = {name: place for place, name in enumerate(name for name, _, _ in GRAPH)}
    waiting = sorted(stages, key=lambda stage: (rank.get(stage.name, len(rank)), stage.name))
    ordered: list[FinishedStage] = []
    while waiting:
        missing = {stage.name for stage in waiting}
        # Manifests that name each other in a circle cannot be ordered: take the first and go on.
        ready = next(
            (stage for stage in waiting if not missing.intersection(stage.inputs)), waiting[0]
        )
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _mark(stages: list[FinishedStage], reused: list[str] | None) -> None:
    """Note which stages were reused, and which were made from inputs that have changed since."""
    digests = {stage.name: stage.digest for stage in stages}
    changed: set[str] = set()
    for stage in stages:
        stage.reused = None if reused is None else stage.name in reused
        given = (stage.manifest.get("inputs") or {}).values()
        stage.stale = sorted(
            {
                i["stage"]
                for i in given
                if digests.get(i["stage"], i["digest"]) != i["digest"] or i["stage"] in changed
            }
        )
        if stage.stale:
            changed.add(stage.name)
