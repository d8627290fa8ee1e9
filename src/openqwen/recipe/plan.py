"""Decide what a run does with each stage, and why: reuse it, run it, or resume it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openqwen.recipe.artifact import (
    Artifact,
    Manifest,
    artifact_key,
    last_save,
    open_artifact,
    outside_source,
    verify,
    version,
)
from openqwen.recipe.folder import RunFolder
from openqwen.recipe.graph import Node
from openqwen.support.errors import OpenQwenError

NOT_MADE = "not made yet"
_SHOW_CHANGES = 3


@dataclass(frozen=True)
class Decision:
    """What happens to one stage.

    key: None while an input is still to be made. artifact: the reused one, or None. seconds: the
    expected time, None where it is unknown.
    """

    node: Node
    action: Literal["reuse", "run", "resume", "blocked"]
    why: str
    key: str | None = None
    artifact: Artifact | None = None
    seconds: float | None = None


def make_plan(
    folder: RunFolder, nodes: Sequence[Node], seed: int, anew: Sequence[str], thorough: bool
) -> list[Decision]:
    """Return the decision for every stage, without changing anything on the disk.

    A stage whose input will be made is expected to run too.
    """
    steps: list[Decision] = []
    digests: dict[str, str | None] = {}
    for node in nodes:
        try:
            given = input_digests(node, digests)
            step = decide(folder, node, seed, given, node.name in anew, thorough)
        except OpenQwenError as error:
            step = Decision(node, "blocked", f"{error.what} {(error.do or '').capitalize()}.")
        steps.append(step)
        digests[node.name] = step.artifact.manifest.digest if step.artifact else None
    return steps


def input_digests(node: Node, made: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return role -> digest of that input; made: stage -> digest, None if it is yet to be made."""
    digests = {role: made[name] for role, name in node.inputs.items()}
    for role, path in node.outside.items():
        digests[role] = outside_source(path, role).entry.digest
    return digests


def decide(
    folder: RunFolder,
    node: Node,
    seed: int,
    digests: Mapping[str, str | None],
    anew: bool,
    thorough: bool = False,
) -> Decision:
    """Return what to do with one stage; raise an error if the artifact to reuse is damaged."""
    seconds = _estimate(folder, node)
    known = {role: digest for role, digest in digests.items() if digest is not None}
    if len(known) < len(digests):
        waiting = [name for role, name in node.inputs.items() if digests[role] is None]
        return Decision(node, "run", f"its input {waiting[0]} is remade", seconds=seconds)
    key = artifact_key(node, seed, known)
    stored = folder.stored(node.name, key)
    if stored.exists() and not anew:
        advice = f"run the same command with --from {node.name} to remake it"
        artifact = open_artifact(stored, advice)
        verify(artifact, advice, thorough)
        return Decision(node, "reuse", "nothing it depends on changed", key, artifact, 0.0)
    current = folder.current(node.name)
    if anew:
        why = "requested by --from"
    elif current is None:
        why = NOT_MADE
    else:
        why = ", ".join(changes(current.manifest, node, seed, known)) or "its artifact is gone"
    resumed = last_save(folder.working(node.name, key) / "scratch") is not None
    return Decision(node, "resume" if resumed else "run", why, key, seconds=seconds)


def _estimate(folder: RunFolder, node: Node) -> float | None:
    former = folder.former(node.name)
    if former is not None:
        return former.manifest.seconds
    return node.estimate() if node.estimate else None


def changes(manifest: Manifest, node: Node, seed: int, digests: Mapping[str, str]) -> list[str]:
    """Describe how an artifact differs from what the stage would make: `train.steps 10 -> 20`."""
    texts = _config_changes(_flat(manifest.config), _flat(node.config.model_dump(mode="json")))
    if manifest.seed != seed:
        texts.append(f"seed {manifest.seed} -> {seed}")
    for role, digest in digests.items():
        former = manifest.inputs.get(role)
        if former is None or former.digest != digest:
            texts.append(f"its input {node.inputs.get(role, role)} changed")
    if manifest.code.get("version") != version():
        texts.append(f"openqwen {manifest.code.get('version')} -> {version()}")
    rest = len(texts) - _SHOW_CHANGES
    return [*texts[:_SHOW_CHANGES], f"and {rest} more"] if rest > 0 else texts


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    texts = []
    for path in [*new, *(path for path in old if path not in new)]:
        if path not in old:
            texts.append(f"{path} is new")
        elif path not in new:
            texts.append(f"{path} is gone")
        elif old[path] != new[path]:
            texts.append(f"{path} {_brief(old[path])} -> {_brief(new[path])}")
    return texts


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    return flat
