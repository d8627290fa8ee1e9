"""One stage outside of a recipe: the same artifact, lock and resuming, in a folder that the user names."""

import shutil
from datetime import datetime
from pathlib import Path

from openqwen.recipe import display
from openqwen.recipe.artifact import (
    MANIFEST,
    Source,
    artifact_key,
    last_save,
    make,
    open_artifact,
    outside_source,
    verify,
)
from openqwen.recipe.graph import Node
from openqwen.recipe.lock import hold
from openqwen.recipe.plan import Decision, changes
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.progress import console


def run_alone(node: Node, output: Path, seed: int, command: str) -> None:
    """Make the stage's artifact at `output` from its outside inputs; the work in progress lies in `.<output>.work`.

    An `output` that holds this very artifact is reused; one that holds anything else is refused.
    """
    output = output.absolute()
    work = output.with_name(f".{output.name}.work")
    sources = {role: outside_source(path, role) for role, path in node.outside.items()}
    digests = {role: source.entry.digest for role, source in sources.items()}
    key = artifact_key(node, seed, digests)
    if _reused(node, output, key, seed, digests):
        return
    with disk_errors(output):
        try:
            work.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise OpenQwenError(f"The folder cannot be made: {error.strerror}.", output, "choose another") from None
        with hold(work / ".lock", command):
            # Another run may have finished between the look above and the lock.
            if not _reused(node, output, key, seed, digests):
                _make(node, sources, seed, key, work / key[:12], output, command)
            shutil.rmtree(work, ignore_errors=True)


def _reused(node: Node, output: Path, key: str, seed: int, digests: dict[str, str]) -> bool:
    """Whether `output` is what would be made; an error if it is something else, False if it is absent or empty."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise OpenQwenError("The output holds something else.", where=output, do="choose another --output")
    advice = "remove the folder and run the same command again"
    artifact = open_artifact(output, advice)
    if artifact.manifest.key != key:
        told = changes(artifact.manifest, node, seed, digests) or [f"it is of stage '{artifact.manifest.stage}'"]
        raise OpenQwenError(
            f"The output holds another artifact: {', '.join(told)}.", where=output, do="choose another --output"
        )
    verify(artifact, advice)
    display.heading(1, 1, Decision(node, "reuse", "", key, artifact))
    return True


def _make(node: Node, sources: dict[str, Source], seed: int, key: str, aside: Path, output: Path, cmd: str) -> None:
    aside.mkdir(exist_ok=True)
    resumed = last_save(aside / "scratch") is not None
    display.heading(1, 1, Decision(node, "resume" if resumed else "run", f"into {output}", key))
    if output.exists():  # empty: the artifact takes its place by a rename
        output.rmdir()
    try:
        artifact = make(node, sources, seed, key, aside, output)
    except KeyboardInterrupt:
        saved = last_save(aside / "scratch")
        kept = f"the state saved at {datetime.fromtimestamp(saved):%H:%M:%S}" if saved else "nothing yet"
        console.print(f"\nInterrupted. Kept: {kept}.\nContinue with: {cmd}", markup=False)
        raise
    display.result(artifact.manifest.metrics, artifact.manifest.seconds)
