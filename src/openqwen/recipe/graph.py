"""The recipe itself: which stages there are, and what flows between them. One line a stage.

    corpus → tokenizer → tokens → pretrain → extend → instruct → sft → prefer → reward
    → dpo, online-dpo

Both preference stages start from the SFT model, so that each can be told from the other.
After each stage that makes a model stands an `evaluate-…` stage that scores it.
What a stage is, its own file says (`support/stage.py`). This file names those files, and loads none
of them by itself.
"""

import ast
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, create_model

from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.settings import Settings
from openqwen.support.stage import CHAT, Stage

# What the scores of an aligned model stand beside: `start` is the model that it was trained from.
_ALIGNED = {"base": "evaluate-extend", "start": "evaluate-sft", "reward": "reward"}
# Name, file, and for each input the earlier line that makes it; None: the stage runs in no recipe.
GRAPH: list[tuple[str, str, dict[str, str] | None]] = [
    ("corpus", "openqwen.instruct.corpus", {}),
    ("tokenizer", "openqwen.corpus.vocabulary", {"corpus": "corpus"}),
    ("tokens", "openqwen.corpus.shards", {"corpus": "corpus", "tokenizer": "tokenizer"}),
    (
        "pretrain",
        "openqwen.train.pretrain",
        {"tokens": "tokens", "tokenizer": "tokenizer", "corpus": "corpus"},
    ),
    ("sweep", "openqwen.train.sweep", None),
    ("evaluate-pretrain", "openqwen.evaluate.model", {"model": "pretrain", "corpus": "corpus"}),
    (
        "extend",
        "openqwen.train.extend",
        {"model": "pretrain", "tokens": "tokens", "corpus": "corpus"},
    ),
    ("evaluate-extend", "openqwen.evaluate.model", {"model": "extend", "corpus": "corpus"}),
    ("upcycle", "openqwen.train.upcycle", None),
    (
        "instruct",
        "openqwen.instruct.synthesize.demonstrations",
        {"corpus": "corpus", "model": "extend"},
    ),
    ("sft", "openqwen.train.sft", {"model": "extend", "demonstrations": "instruct"}),
    (
        "evaluate-sft",
        "openqwen.evaluate.model",
        {"model": "sft", "corpus": "corpus", "base": "evaluate-extend"},
    ),
    ("prefer", "openqwen.instruct.synthesize.preferences", {"model": "sft"}),
    ("reward", "openqwen.train.reward", {"model": "sft", "preferences": "prefer"}),
    ("evaluate-reward", "openqwen.evaluate.reward", {"reward": "reward", "preferences": "prefer"}),
    ("dpo", "openqwen.train.dpo", {"model": "sft", "preferences": "prefer"}),
    ("evaluate-dpo", "openqwen.evaluate.model", {"model": "dpo", "corpus": "corpus", **_ALIGNED}),
    (
        "online-dpo",
        "openqwen.train.online_dpo",
        {"model": "sft", "reward": "reward", "prompts": "instruct"},
    ),
    (
        "evaluate-online-dpo",
        "openqwen.evaluate.model",
        {"model": "online-dpo", "corpus": "corpus", **_ALIGNED},
    ),
]

MODELS = {"model", "reward"}  # inputs and settings that may be a hub id too


@dataclass(frozen=True)
class Node:
    """A stage in its place in a recipe.

    inputs: role -> name of an earlier node. outside: role -> file or folder that no stage makes; it
    is part of what the artifact depends on. estimate: the seconds it should take.
    """

    name: str
    stage: Stage
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, Path] = field(default_factory=dict)
    estimate: Callable[[], float] | None = None


def verbs() -> dict[str, str]:
    """Name -> help of every stage that the command line offers. No stage is loaded."""
    found: dict[str, str] = {}
    for _, file, _ in GRAPH:
        name, text = _declared(file)
        if text:
            found[name] = found.pop(name, text)  # of several lines, the last one gives the place
    return found


def load_stage(name: str) -> Stage:
    """The stage of that name; its file, and no other, is loaded."""
    return _load(next(file for _, file, _ in GRAPH if _declared(file)[0] == name))


def _load(file: str) -> Stage:
    stage: Stage = importlib.import_module(file).STAGE
    return stage


@functools.cache
def _declared(file: str) -> tuple[str, str]:
    """Name and help of the stage in a file. It is read and not loaded: torch takes seconds."""
    places: Sequence[str] | None = None
    source = ""
    for part in file.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            raise ModuleNotFoundError(f"the graph names {file}, which does not exist")
        source, places = spec.origin or "", spec.submodule_search_locations
    last = ast.parse(Path(source).read_text(encoding="utf-8")).body[-1]
    if not isinstance(last, ast.Assign) or not isinstance(last.value, ast.Call):
        raise ValueError(f"{source} does not end with STAGE = Stage(...)")
    told = {
        k.arg: ast.literal_eval(k.value) for k in last.value.keywords if k.arg in ("name", "help")
    }
    return told["name"], told["help"]


def sections() -> dict[str, Stage]:
    """The settings of a recipe: a section bears the name of the first stage that reads it.

    Stages of one configuration class share their section; a stage without settings has none.
    """
    first: dict[type[BaseModel], Stage] = {}
    for _, file, inputs in GRAPH:
        stage = _load(file)
        if inputs is not None and stage.config.model_fields:
            first[stage.config] = first.pop(stage.config, stage)  # the last line gives the place
    return {stage.name.replace("-", "_"): stage for stage in first.values()}


def recipe_class() -> type[Settings]:
    """The class of everything a run depends on; the same graph gives the same class."""
    return _class_of(tuple((name, stage.config, stage.help) for name, stage in sections().items()))


@functools.cache
def _class_of(sections: tuple[tuple[str, type[BaseModel], str], ...]) -> type[Settings]:
    fields: dict[str, Any] = {"seed": (int, Field(1, ge=0, description="of every random draw"))}
    for name, config, text in sections:
        fields[name] = (config, Field(default_factory=config, description=text))
    return create_model(
        "Recipe", __base__=Settings, __doc__="Everything a run depends on.", **fields
    )


def nodes_of(recipe: Any) -> list[Node]:
    """The stages of a recipe, in the order they run."""
    from openqwen.recipe.estimate import seconds

    section_of = {stage.config: name for name, stage in sections().items()}
    nodes: list[Node] = []
    for name, file, inputs in GRAPH:
        if inputs is None:
            continue
        stage = _load(file)
        config = (
            getattr(recipe, section_of[stage.config])
            if stage.config in section_of
            else stage.config()
        )
        estimate = functools.partial(seconds, stage, recipe, inputs) if stage.estimate else None
        nodes.append(Node(name, stage, config, inputs, outside_of(config), estimate))
    return nodes


def outside_of(config: BaseModel) -> dict[str, Path]:
    """What a configuration names by its path: the artifact depends on its content too.

    A hub id is no path.
    """
    paths = {name: value for name, value in config if isinstance(value, Path)}
    return {name: path for name, path in paths.items() if name not in MODELS or path.exists()}


def finish(run_folder: Path) -> list[str]:
    """Write the report; the lines that end a run."""
    from openqwen.recipe.report import write_report

    lines = [f"report   {write_report(run_folder)}"]
    made = [
        (name, _load(file)) for name, file, _ in reversed(GRAPH) if (run_folder / name).exists()
    ]
    chat = next((name for name, stage in made if CHAT in stage.outputs), None)
    return [*lines, f"chat     {command('chat', run_folder / chat)}"] if chat else lines


def select(nodes: Sequence[Node], until: str | None) -> list[Node]:
    """The stages up to and with `until`; all of them where it is None."""
    if until is None:
        return list(nodes)
    return list(nodes[: position(nodes, until, "--until") + 1])


def position(nodes: Sequence[Node], name: str, flag: str) -> int:
    """The index of the stage of that name; an unknown one is an error that suggests the nearest."""
    names = [node.name for node in nodes]
    if name not in names:
        raise OpenQwenError(
            f"There is no stage '{name}'.{suggestion(name, names)}",
            where=f"{flag} {name}",
            do=f"name one of: {', '.join(names)}",
        )
    return names.index(name)


def check_graph(nodes: Sequence[Node]) -> None:
    """Names are unique, and an input is what a stage that comes before makes."""
    seen: dict[str, Node] = {}
    for node in nodes:
        if node.name in seen:
            raise ValueError(f"two stages are named '{node.name}'")
        for role, name in node.inputs.items():
            if name not in seen or role not in seen[name].stage.outputs:
                raise ValueError(
                    f"stage '{node.name}': no stage '{name}' before it makes its input '{role}'"
                )
        seen[node.name] = node
