"""Runs a recipe, or one stage alone.

Each stage is reused, resumed or run, in order, and nothing finished is ever lost.
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

    start_from: make that stage and all later ones anew. dry_run: print the plan and change nothing.
    thorough: check the content of files over 1 GB too. command: what the lock says of this run;
    continue_command: what to type after an interruption. finish: called with the run folder after
    the last stage; its lines are printed. Raises OpenQwenError (a damaged artifact, a held folder,
    a full disk, a stage's own), KeyboardInterrupt.
    """
    check_graph(nodes)
    chosen = select(nodes, until)
    demanded: list[str] = []
    if start_from is not None:
        demanded = [
            node.name for node in nodes[position(nodes, start_from, "--from") : len(chosen)]
        ]
        if not demanded:
            raise OpenQwenError(
                "Nothing is left to run.", f"--until {until} --from {start_from}", "swap the two"
            )
    folder = RunFolder(run_folder)
    if dry_run:
        display.plan_table(
            make_plan(folder, chosen, seed, [*demanded, *folder.pending()], thorough)
        )
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
            sources[role] = Source(
                artifact.folder, InputEntry(stage=name, digest=artifact.manifest.digest)
            )
        return sources

    def _make(self, step: Decision, sources: dict[str, Source]) -> Artifact:
        name, key = step.node.name, step.key
        assert key is not None
        work, target = self.folder.working(name, key), self.folder.stored(name, key)
        with disk_errors(self.folder.root / name):
            return _make(
                step, sources, self.seed, work, target, len(self.made), self.continue_command
            )

    def _close(self) -> None:
        # For the report, which otherwise knows the artifacts alone.
        write_json(self.folder.root / "run.json", {"reused": sorted(self.reused)})
        display.results_table([(a.manifest, name in self.reused) for name, a in self.made.items()])
        other = [n for n, a in self.made.items() if a.manifest.code.get("digest") != code_digest()]
        if other:
            display.note(
                f"Made by other code: {', '.join(other)} (--from {other[0]} makes them anew)."
            )


def run_alone(node: Node, output: Path, seed: int, command: str) -> None:
    """Make the stage's artifact at `output` from its outside inputs; the work in progress lies in
    `.<output>.work`.

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
            raise OpenQwenError(
                f"The folder cannot be made: {error.strerror}.", output, "choose another"
            ) from None
        with hold(work / ".lock", command):
            # Another run may have finished between the look above and the lock.
            if not _reused(node, output, key, seed, digests):
                aside = work / key[:12]
                resumed = last_save(aside / "scratch") is not None
                step = Decision(node, "resume" if resumed else "run", f"into {output}", key)
                display.heading(1, 1, step)
                if output.exists():  # empty: the artifact takes its place by a rename
                    output.rmdir()
                _make(step, sources, seed, aside, output, finished=0, continue_command=command)
            shutil.rmtree(work, ignore_errors=True)


def _reused(node: Node, output: Path, key: str, seed: int, digests: dict[str, str]) -> bool:
    """Whether `output` is what would be made; an error if it is something else, False if it is
    absent or empty.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise OpenQwenError(
            "The output holds something else.", where=output, do="choose another --output"
        )
    advice = "remove the folder and run the same command again"
    artifact = open_artifact(output, advice)
    if artifact.manifest.key != key:
        told = changes(artifact.manifest, node, seed, digests) or [
            f"it is of stage '{artifact.manifest.stage}'"
        ]
        raise OpenQwenError(
            f"The output holds another artifact: {', '.join(told)}.",
            where=output,
            do="choose another --output",
        )
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
    """Make a stage's artifact aside in `work`; where that stops, say what is kept and how to go
    on.
    """
    node, key = step.node, step.key
    assert key is not None
    work.mkdir(exist_ok=True)
    try:
        artifact = make(node, sources, seed, key, work, target)
    except BaseException as stop:
        kept = [f"{finished} finished stage{'s' * (finished != 1)}"] if finished else []
        if (saved := last_save(work / "scratch")) is not None:
            kept.append(
                f"the state that {node.name} saved at {datetime.fromtimestamp(saved):%H:%M:%S}"
            )
        interrupted = isinstance(stop, KeyboardInterrupt)
        what = "Interrupted" if interrupted else "Stopped"
        console.print(
            f"\n{what} in {node.name}. Kept: {' and '.join(kept) or 'nothing yet'}.", markup=False
        )
        if interrupted and continue_command:
            console.print(f"Continue with: {continue_command}", markup=False)
        raise
    display.result(artifact.manifest.metrics, artifact.manifest.seconds)
    return artifact
