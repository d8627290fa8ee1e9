"""Run a recipe, or one stage alone.

Each stage in turn is reused, resumed or run. No finished stage is ever lost.
"""

import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from openqwen.recipe import display
from openqwen.recipe.artifact import (
    MANIFEST,
    Artifact,
    InputEntry,
    Source,
    artifact_key,
    code_digest,
    last_save,
    make,
    open_artifact,
    outside_source,
    verify,
)
from openqwen.recipe.folder import RunFolder
from openqwen.recipe.graph import Node, check_graph, position, select
from openqwen.recipe.lock import hold
from openqwen.recipe.plan import Decision, changes, decide, make_plan
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import write_json
from openqwen.support.progress import console


def run_recipe(
    nodes: Sequence[Node],
    run_folder: Path,
    *,
    seed: int = 0,
    until: str | None = None,
    start_from: str | None = None,
    dry_run: bool = False,
    thorough: bool = False,
    command: str = "",
    continue_command: str = "",
    finish: Callable[[Path], list[str]] | None = None,
) -> None:
    """Make or reuse the artifact of every stage, up to `until`.

    Args:
        nodes: The stages, in order.
        run_folder: Where artifacts and links go.
        seed: Seed of every random draw.
        until: The last stage to make; None: all.
        start_from: Remake this stage and all later ones.
        dry_run: Print the plan and change nothing.
        thorough: Check the content of files over 1 GB too.
        command: What the lock file says about this run.
        continue_command: What the user types to continue after an interruption.
        finish: Called with the run folder after the last stage; returns lines to print.

    Raises:
        OpenQwenError: A damaged artifact, a folder in use, a full disk, or an error of a stage.
    """
    check_graph(nodes)
    chosen = select(nodes, until)
    demanded: list[str] = []
    if start_from is not None:
        later = nodes[position(nodes, start_from, "--from") : len(chosen)]
        demanded = [node.name for node in later]
        if not demanded:
            where = f"--until {until} --from {start_from}"
            raise OpenQwenError("Nothing is left to run.", where, "swap the two")
    folder = RunFolder(run_folder)
    if dry_run:
        anew = [*demanded, *folder.pending()]
        display.plan_table(make_plan(folder, chosen, seed, anew, thorough))
        return
    folder.prepare_root()
    with disk_errors(run_folder), hold(folder.lock, command):
        folder.prepare()
        folder.demand(demanded)
        _Run(folder, chosen, seed, thorough, continue_command).run()
        for line in finish(run_folder) if finish else []:
            console.print(line, markup=False)


class _Run:
    """One run under the lock."""

    def __init__(
        self,
        folder: RunFolder,
        nodes: Sequence[Node],
        seed: int,
        thorough: bool,
        continue_command: str,
    ):
        self.folder, self.nodes, self.seed, self.thorough = folder, nodes, seed, thorough
        self.continue_command = continue_command
        self.made: dict[str, Artifact] = {}
        self.reused: set[str] = set()

    def run(self) -> None:
        for number, node in enumerate(self.nodes, 1):
            sources = self._sources(node)
            digests = {role: source.entry.digest for role, source in sources.items()}
            anew = node.name in self.folder.pending()
            step = decide(self.folder, node, self.seed, digests, anew, self.thorough)
            display.heading(number, len(self.nodes), step)
            self.made[node.name] = artifact = step.artifact or self._make(step, sources)
            self.folder.link(node.name, artifact.folder)
            self.folder.fulfil(node.name)
            if step.artifact is not None:
                self.reused.add(node.name)
        self._close()

    def _sources(self, node: Node) -> dict[str, Source]:
        sources = {role: outside_source(path, role) for role, path in node.outside.items()}
        for role, name in node.inputs.items():
            artifact = self.made[name]
            entry = InputEntry(stage=name, digest=artifact.manifest.digest)
            sources[role] = Source(artifact.folder, entry)
        return sources

    def _make(self, step: Decision, sources: dict[str, Source]) -> Artifact:
        name, key = step.node.name, step.key
        assert key is not None
        work, target = self.folder.working(name, key), self.folder.stored(name, key)
        finished = len(self.made)
        with disk_errors(self.folder.root / name):
            return _make(step, sources, self.seed, work, target, finished, self.continue_command)

    def _close(self) -> None:
        # The report reads this file: the artifacts do not say which stages were reused.
        write_json(self.folder.root / "run.json", {"reused": sorted(self.reused)})
        display.results_table([(a.manifest, name in self.reused) for name, a in self.made.items()])
        other = [n for n, a in self.made.items() if a.manifest.code.get("digest") != code_digest()]
        if other:
            names = ", ".join(other)
            display.note(
                f"Made by another version of the code: {names} (--from {other[0]} remakes them)."
            )


def run_alone(node: Node, output: Path, seed: int, command: str) -> None:
    """Make the artifact of one stage at `output`; work in progress lies in `.<output>.work`.

    If `output` holds this artifact already, it is reused. If it holds anything else, an
    OpenQwenError is raised.
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
            what = f"The folder cannot be made: {error.strerror}."
            raise OpenQwenError(what, output, "choose another --output") from None
        with hold(work / ".lock", command):
            # Another run may have finished between the check above and the lock.
            if not _reused(node, output, key, seed, digests):
                aside = work / key[:12]
                resumed = last_save(aside / "scratch") is not None
                step = Decision(node, "resume" if resumed else "run", f"into {output}", key)
                display.heading(1, 1, step)
                if output.exists():  # it is empty, and the artifact is renamed to it
                    output.rmdir()
                _make(step, sources, seed, aside, output, finished=0, continue_command=command)
            shutil.rmtree(work, ignore_errors=True)


def _reused(node: Node, output: Path, key: str, seed: int, digests: dict[str, str]) -> bool:
    """Return whether `output` is the wanted artifact; False if it is absent or empty.

    Raises OpenQwenError if it is something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    do = "choose another --output"
    if not (output / MANIFEST).is_file():
        raise OpenQwenError("The output holds something else.", where=output, do=do)
    advice = "remove the folder and run the same command again"
    artifact = open_artifact(output, advice)
    if artifact.manifest.key != key:
        stage = f"it is of stage '{artifact.manifest.stage}'"
        why = ", ".join(changes(artifact.manifest, node, seed, digests)) or stage
        raise OpenQwenError(f"The output holds another artifact: {why}.", where=output, do=do)
    verify(artifact, advice)
    display.heading(1, 1, Decision(node, "reuse", "", key, artifact))
    return True


def _make(
    step: Decision,
    sources: dict[str, Source],
    seed: int,
    work: Path,
    target: Path,
    finished: int,
    continue_command: str,
) -> Artifact:
    """Make a stage's artifact in `work`; if that stops, print what is kept and how to continue."""
    node, key = step.node, step.key
    assert key is not None
    work.mkdir(exist_ok=True)
    try:
        artifact = make(node, sources, seed, key, work, target)
    except BaseException as stop:
        kept = [f"{finished} finished stage{'s' * (finished != 1)}"] if finished else []
        if (saved := last_save(work / "scratch")) is not None:
            time = datetime.fromtimestamp(saved)
            kept.append(f"the state that {node.name} saved at {time:%H:%M:%S}")
        interrupted = isinstance(stop, KeyboardInterrupt)
        what = "Interrupted" if interrupted else "Stopped"
        state = " and ".join(kept) or "nothing yet"
        console.print(f"\n{what} in {node.name}. Kept: {state}.", markup=False)
        if interrupted and continue_command:
            console.print(f"Continue with: {continue_command}", markup=False)
        raise
    display.result(artifact.manifest.metrics, artifact.manifest.seconds)
    return artifact
