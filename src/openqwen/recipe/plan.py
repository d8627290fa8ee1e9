"""What a run will do with each stage, and why: reuse it, run it, or resume it."""

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

    key: None while an input is still to be made. artifact: what is reused. seconds: how long it
    should take, None where nobody can tell.
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
    """The whole plan, changing nothing on the disk.

    A stage whose input will be made is assumed to follow.
    """
    steps: list[Decision] = []
    digests: dict[str, str | None] = {}
    for node in nodes:
        try:
            step = decide(
                folder, node, seed, input_digests(node, digests), node.name in anew, thorough
            )
        except OpenQwenError as error:
            step = Decision(node, "blocked", f"{error.what} {(error.do or '').capitalize()}.")
        steps.append(step)
        digests[node.name] = step.artifact.manifest.digest if step.artifact else None
    return steps


def input_digests(node: Node, made: Mapping[str, str | None]) -> dict[str, str | None]:
    """role -> digest of that input; made: stage name -> digest, None while it is still to be
    made.
    """
    digests = {role: made[name] for role, name in node.inputs.items()}
    return digests | {
        role: outside_source(path, role).entry.digest for role, path in node.outside.items()
    }


def decide(
    folder: RunFolder,
    node: Node,
    seed: int,
    digests: Mapping[str, str | None],
    anew: bool,
    thorough: bool = False,
) -> Decision:
    """What to do with one stage; a stored artifact that would be reused but is damaged is an
    error.
    """
    seconds = _estimate(folder, node)
    known = {role: digest for role, digest in digests.items() if digest is not None}
    if len(known) < len(digests):
        waiting = [name for role, name in node.inputs.items() if digests[role] is None]
        return Decision(node, "run", f"its input {waiting[0]} is made anew", seconds=seconds)
    key = artifact_key(node, seed, known)
    stored = folder.stored(node.name, key)
    if stored.exists() and not anew:
        advice = f"run the same command with --from {node.name} to make it anew"
        artifact = open_artifact(stored, advice)
        verify(artifact, advice, thorough)
        return Decision(node, "reuse", "nothing it depends on changed", key, artifact, 0.0)
    current = folder.current(node.name)
    if anew:
        why = "asked for by --from"
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
    """In what an artifact differs from what the stage would make now, in words: `train.steps 10 ->
    20`.
    """
    told = _config_changes(_flat(manifest.config), _flat(node.config.model_dump(mode="json")))
    if manifest.seed != seed:
        told.append(f"seed {manifest.seed} -> {seed}")
    for role, digest in digests.items():
        former = manifest.inputs.get(role)
        if former is None or former.digest != digest:
            told.append(f"its input {node.inputs.get(role, role)} changed")
    if manifest.code.get("version") != version():
        told.append(f"openqwen {manifest.code.get('version')} -> {version()}")
    rest = len(told) - _SHOW_CHANGES
    return [*told[:_SHOW_CHANGES], f"and {rest} more"] if rest > 0 else told


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    told = []
    for path in [*new, *(path for path in old if path not in new)]:
        if path not in old:
            told.append(f"{path} is new")
        elif path not in new:
            told.append(f"{path} is gone")
        elif old[path] != new[path]:
            told.append(f"{path} {_brief(old[path])} -> {_brief(new[path])}")
    return told


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted path: leaf}."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    return flat
