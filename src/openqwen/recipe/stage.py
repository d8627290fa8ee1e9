"""What a stage is: a function from artifacts to an artifact (law 5), and what it is given to work with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from openqwen.support.errors import OpenQwenError, suggestion


@dataclass(frozen=True)
class Work:
    """What one run of a stage gets.

    inputs: role -> folder or file to read. output: an empty folder for the payload, renamed into place when the stage
    returns. scratch: a folder that survives kills until the stage is finished; training states go here, and a stage
    that finds one continues from it. Same config, seed and input bytes must give the same output bytes.
    """

    config: Any
    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    seed: int
    label: str


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    inputs: role -> name of an earlier stage. outside: role -> file or folder that no stage makes; it is part of what
    the artifact depends on. run: returns the metrics, the most telling first. estimate: seconds for a given config.
    """

    name: str
    kind: str
    config: BaseModel
    run: Callable[[Work], dict[str, float]]
    inputs: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, Path] = field(default_factory=dict)
    estimate: Callable[[BaseModel], float] | None = None


@dataclass(frozen=True)
class Verb:
    """A stage kind that runs alone from the command line; inputs: role -> what to give for it."""

    help: str
    config: type[BaseModel]
    inputs: Mapping[str, str]
    run: Callable[[Work], dict[str, float]]


def outside_of(config: BaseModel) -> dict[str, Path]:
    """What a configuration names by its path: the artifact depends on its content too. A hub id is no path."""
    return {name: value for name, value in config if isinstance(value, Path) and value.exists()}


def select(stages: Sequence[Stage], until: str | None) -> list[Stage]:
    """The stages up to and with `until`; all of them where it is None."""
    if until is None:
        return list(stages)
    return list(stages[: position(stages, until, "--until") + 1])


def position(stages: Sequence[Stage], name: str, flag: str) -> int:
    """The index of the stage of that name; an unknown one is an error that suggests the nearest."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise OpenQwenError(
            f"There is no stage '{name}'.{suggestion(name, names)}",
            where=f"{flag} {name}",
            do=f"name one of: {', '.join(names)}",
        )
    return names.index(name)


def check_graph(stages: Sequence[Stage]) -> None:
    """Names are unique, and an input is a stage that comes before."""
    seen: set[str] = set()
    for stage in stages:
        if stage.name in seen or not seen.issuperset(stage.inputs.values()):
            raise ValueError(f"stage '{stage.name}': its name is taken, or an input of {stage.inputs} comes later")
        seen.add(stage.name)
