"""Runs a recipe: each stage is reused, resumed or run, in order, and nothing finished is ever lost."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from openqwen.recipe import display
from openqwen.recipe.artifact import (
    Artifact,
    InputEntry,
    Source,
    code_digest,
    last_save,
    make,
    outside_source,
)
from openqwen.recipe.folder import RunFolder
from openqwen.recipe.graph import Node, check_graph, position, select
from openqwen.recipe.lock import hold
from openqwen.recipe.plan import Decision, decide, make_plan
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

    start_from: make that stage and all later ones anew. dry_run: print the plan and change nothing. thorough: check the
    content of files over 1 GB too. command: what the lock says of this run; continue_command: what to type after an
    interruption. finish: called with the run folder after the last stage; its lines are printed.
    Raises OpenQwenError (a damaged artifact, a held folder, a full disk, a stage's own), KeyboardInterrupt.
    """
    check_graph(nodes)
    chosen = select(nodes, until)
    demanded: list[str] = []
    if start_from is not None:
        demanded = [node.name for node in nodes[position(nodes, start_from, "--from") : len(chosen)]]
        if not demanded:
            raise OpenQwenError("Nothing is left to run.", f"--until {until} --from {start_from}", "swap the two")
    folder = RunFolder(run_folder)
    if dry_run:
        display.plan_table(make_plan(folder, chosen, seed, [*demanded, *folder.pending()], thorough))
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

    def __init__(self, folder: RunFolder, nodes: Sequence[Node], seed: int, thorough: bool, continue_command: str):
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
            sources[role] = Source(artifact.folder, InputEntry(stage=name, digest=artifact.manifest.digest))
        return sources

    def _make(self, step: Decision, sources: dict[str, Source]) -> Artifact:
        node, key = step.node, step.key
        assert key is not None
        work = self.folder.working(node.name, key)
        work.mkdir(exist_ok=True)
        try:
            with disk_errors(self.folder.root / node.name):
                artifact = make(node, sources, self.seed, key, work, self.folder.stored(node.name, key))
        except BaseException as stop:
            self._tell_kept(node.name, work / "scratch", interrupted=isinstance(stop, KeyboardInterrupt))
            raise
        display.result(artifact.manifest.metrics, artifact.manifest.seconds)
        return artifact

    def _tell_kept(self, stage: str, scratch: Path, interrupted: bool) -> None:
        count = len(self.made)
        kept = [f"{count} finished stage{'s' * (count != 1)}"]
        saved = last_save(scratch)
        if saved is not None:
            kept.append(f"the state that {stage} saved at {datetime.fromtimestamp(saved):%H:%M:%S}")
        console.print(f"\n{'Interrupted' if interrupted else 'Stopped'} in {stage}. Kept: {' and '.join(kept)}.")
        if interrupted and self.continue_command:
            console.print(f"Continue with: {self.continue_command}", markup=False)

    def _close(self) -> None:
        # For the report, which otherwise knows the artifacts alone.
        write_json(self.folder.root / "run.json", {"reused": sorted(self.reused)})
        display.results_table([(a.manifest, name in self.reused) for name, a in self.made.items()])
        other = [n for n, a in self.made.items() if a.manifest.code.get("digest") != code_digest()]
        if other:
            display.note(f"Made by other code: {', '.join(other)} (--from {other[0]} makes them anew).")
