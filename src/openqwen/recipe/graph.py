"""The graph of a recipe: its stages, one line each, and what flows between them.

    corpus → tokenizer → tokens → pretrain → extend → instruct → sft → prefer → reward
    → dpo, online-dpo, grpo

These three all start from the SFT model, so that their effects can be compared. After each
stage that makes a model, an `evaluate-…` stage scores it. Each stage is declared in its own file
(see `support/stage.py`). This file names those files and imports none of them at start.
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

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.settings import Settings
from openqwen.support.stage import CHAT, Stage

# The scores that those of an aligned model are compared with; `start`: the model it started from.
_ALIGNED = {"base": "evaluate-extend", "start": "evaluate-sft", "reward": "reward"}
# Name, module, and for each input the earlier stage that makes it; None: the stage is in no recipe.
GRAPH: list[tuple[str, str, dict[str, str] | None]] = [
    ("corpus", "openqwen.instruct.corpus", {}),
    ("quality", "openqwen.corpus.quality", None),
    ("tokenizer", "openqwen.corpus.vocabulary", {"corpus": "corpus"}),
    ("tokens", "openqwen.corpus.shards", {"corpus": "corpus", "tokenizer": "tokenizer"}),
    (
        "pretrain",
        "openqwen.train.pretrain",
        {"tokens": "tokens", "tokenizer": "tokenizer", "corpus": "corpus"},
    ),
    ("sweep", "openqwen.train.sweep", None),
    ("corpus-mix", "openqwen.train.mixture_search", None),
    ("evaluate-pretrain", "openqwen.evaluate.model", {"model": "pretrain", "corpus": "corpus"}),
    (
        "extend",
        "openqwen.train.extend",
        {"model": "pretrain", "tokens": "tokens", "corpus": "corpus"},
    ),
    ("evaluate-extend", "openqwen.evaluate.model", {"model": "extend", "corpus": "corpus"}),
    ("upcycle", "openqwen.train.upcycle", None),
    ("merge", "openqwen.train.merge", None),
    ("instruct", "openqwen.instruct.synthesize.demonstrations", {"corpus": "corpus"}),
    ("sft", "openqwen.train.sft", {"model": "extend", "demonstrations": "instruct"}),
    (
        "evaluate-sft",
        "openqwen.evaluate.model",
        {"model": "sft", "corpus": "corpus", "base": "evaluate-extend"},
    ),
    ("synthesize-ratings", "openqwen.instruct.synthesize.methods.ratings", None),
    ("synthesize-rejection", "openqwen.instruct.synthesize.methods.rejection", None),
    ("synthesize-execution", "openqwen.instruct.synthesize.methods.execution", None),
    ("synthesize-instructions", "openqwen.instruct.synthesize.methods.instructions", None),
    ("synthesize-repurpose", "openqwen.instruct.synthesize.methods.repurpose", None),
    ("synthesize-constitution", "openqwen.instruct.synthesize.methods.constitution", None),
    ("synthesize-structured", "openqwen.instruct.synthesize.methods.structured", None),
    ("synthesize-reasoning", "openqwen.instruct.synthesize.methods.reasoning", None),
    ("synthesize-adapt", "openqwen.instruct.synthesize.methods.adapt", None),
    ("synthesize-critic", "openqwen.instruct.synthesize.methods.critic", None),
    ("synthesize-pretraining", "openqwen.instruct.synthesize.methods.pretraining", None),
    ("synthesize-long", "openqwen.instruct.synthesize.long_documents", None),
    ("instructions-tag", "openqwen.instruct.collaborate.tag", None),
    ("instructions-select", "openqwen.instruct.collaborate.select", None),
    ("instructions-evolve", "openqwen.instruct.collaborate.evolve", None),
    ("instructions-respond", "openqwen.instruct.collaborate.respond", None),
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
    (
        "grpo",
        "openqwen.train.grpo",
        {"model": "sft", "reward": "reward", "prompts": "instruct"},
    ),
    ("evaluate-grpo", "openqwen.evaluate.model", {"model": "grpo", "corpus": "corpus", **_ALIGNED}),
]

MODELS = {
    "model",
    "models",
    "reward",
    "base",
}  # inputs and settings that may be a hub id instead of a path


@dataclass(frozen=True)
class Node:
    """A stage at its place in a recipe.

    inputs: role -> name of an earlier node. outside: role -> file or folder that no stage makes;
    the artifact depends on its content too. estimate: returns the expected seconds.
    """

    name: str
    stage: Stage
    config: BaseModel
    inputs: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, Path] = field(default_factory=dict)
    estimate: Callable[[], float] | None = None


def verbs() -> dict[str, str]:
    """Return name -> help of every stage that is a verb, without importing any stage."""
    helps: dict[str, str] = {}
    for _, module, _ in GRAPH:
        name, text = _declared(module)
        if text:
            helps[name] = helps.pop(name, text)  # a stage of several lines stands at its last one
    return helps


def load_stage(name: str) -> Stage:
    """Import the module of the stage of that name, and no other, and return the stage."""
    return _load(next(module for _, module, _ in GRAPH if _declared(module)[0] == name))


def _load(module: str) -> Stage:
    stage: Stage = importlib.import_module(module).STAGE
    return stage


@functools.cache
def _declared(module: str) -> tuple[str, str]:
    """Return name and help of a module's stage from its text; importing torch takes seconds."""
    places: Sequence[str] | None = None
    source = ""
    for part in module.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            raise ModuleNotFoundError(f"the graph names {module}, which does not exist")
        source, places = spec.origin or "", spec.submodule_search_locations
    last = ast.parse(Path(source).read_text(encoding="utf-8")).body[-1]
    if not isinstance(last, ast.Assign) or not isinstance(last.value, ast.Call):
        raise ValueError(f"{source} does not end with STAGE = Stage(...)")
    keywords = {keyword.arg: keyword.value for keyword in last.value.keywords}
    return ast.literal_eval(keywords["name"]), ast.literal_eval(keywords["help"])


def sections(alone: bool = False) -> dict[str, Stage]:
    """Return the sections of a recipe's settings: name -> the first stage that reads the section.

    Stages with the same configuration class share a section; a stage without settings has none.
    alone: include stages that run alone, in no recipe.
    """
    first: dict[type[BaseModel], Stage] = {}
    for _, module, inputs in GRAPH:
        stage = _load(module)
        if (alone or inputs is not None) and stage.config.model_fields:
            first[stage.config] = first.pop(stage.config, stage)  # it stands at its last line
    return {stage.name.replace("-", "_"): stage for stage in first.values()}


def recipe_class(alone: bool = False) -> type[Settings]:
    """Return the settings class of a recipe; the same graph gives the same class.

    alone: with the sections of stages that run alone, which read them with `--recipe`.
    """
    parts = sections(alone).items()
    return _class_of(tuple((name, stage.config, stage.help) for name, stage in parts))


@functools.cache
def _class_of(sections: tuple[tuple[str, type[BaseModel], str], ...]) -> type[Settings]:
    fields: dict[str, Any] = {
        "seed": (int, Field(1, ge=0, description="seed of every random draw")),
        "last_stage": (
            str | None,
            Field(None, description="the recipe's last stage; none: all stages are made"),
        ),
    }
    for name, config, text in sections:
        fields[name] = (config, Field(default_factory=config, description=text))
    return create_model(
        "Recipe", __base__=Settings, __doc__="Everything a run depends on.", **fields
    )


def nodes_of(recipe: Any) -> list[Node]:
    """Return the stages of a recipe, in the order in which they run."""
    from openqwen.recipe.estimate import seconds

    section_of = {stage.config: name for name, stage in sections().items()}
    nodes: list[Node] = []
    for name, module, inputs in GRAPH:
        if inputs is None:
            continue
        stage = _load(module)
        section = section_of.get(stage.config)
        config = getattr(recipe, section) if section else stage.config()
        estimate = functools.partial(seconds, stage, recipe, inputs) if stage.estimate else None
        outside, base = outside_of(config), str(_merging_base(config))
        if base in {node.name for node in nodes}:
            inputs = {**inputs, "base": base}
            outside.pop("base", None)
        nodes.append(Node(name, stage, config, inputs, outside, estimate))
    if recipe.last_stage is None:
        return nodes
    return nodes[: position(nodes, recipe.last_stage, "last_stage") + 1]


def outside_of(config: BaseModel) -> dict[str, Path]:
    """Return the paths in a configuration: the artifact depends on their content too.

    A hub id is not a path.
    """
    paths = {name: value for name, value in config if isinstance(value, Path)}
    for name, value in config:
        if isinstance(value, list):  # such as the models that `merge` reads
            paths |= {f"{name}.{n}": p for n, p in enumerate(value) if isinstance(p, Path)}
    if (base := _merging_base(config)) is not None:
        paths["base"] = base
    return {
        name: path
        for name, path in paths.items()
        if name.partition(".")[0] not in MODELS or path.exists()
    }


def _merging_base(config: Any) -> Path | None:
    """Return the base of `train.merging`: a path, a hub id or the name of an earlier stage."""
    return getattr(getattr(getattr(config, "train", None), "merging", None), "base", None)


def last_chat_model(run_folder: Path) -> Path | None:
    """Return the folder of the last stage in a run folder whose model can be talked to, or None."""
    for name, module, _ in reversed(GRAPH):
        if (run_folder / name).exists() and CHAT in _load(module).outputs:
            return run_folder / name
    return None


def select(nodes: Sequence[Node], until: str | None) -> list[Node]:
    """Return the stages up to and including `until`; all of them where it is None."""
    if until is None:
        return list(nodes)
    return list(nodes[: position(nodes, until, "--until") + 1])


def position(nodes: Sequence[Node], name: str, flag: str) -> int:
    """Return the index of a stage; an unknown name is an error that suggests the nearest one."""
    names = [node.name for node in nodes]
    if name not in names:
        raise OpenQwenError(
            f"There is no stage '{name}'.{suggestion(name, names)}",
            where=f"{flag} {name}",
            do=f"name one of: {', '.join(names)}",
        )
    return names.index(name)


def check_graph(nodes: Sequence[Node]) -> None:
    """Raise ValueError unless names are unique and earlier stages make every input."""
    seen: dict[str, Node] = {}
    for node in nodes:
        if node.name in seen:
            raise ValueError(f"two stages are named '{node.name}'")
        for role, name in node.inputs.items():
            made = seen[name].stage.outputs if name in seen else ()
            if role not in made and not (role == "base" and "model" in made):
                raise ValueError(
                    f"stage '{node.name}': no stage '{name}' before it makes its input '{role}'"
                )
        seen[node.name] = node
