"""Runs a method over all its items: requests side by side, results in the items' order.

    items → steps of many items → calls (journal.py) → generators (engine/lanes.py)
                                → batches: graders, sandbox, reward model
    finished items, in order → finished.jsonl → demonstrations, preferences, quarantine, report

A kill loses nothing that was paid for. `calls.jsonl` has every finished call; `finished.jsonl` has
every finished item up to the first unfinished one. A run that is resumed reads both, and gives the
same bytes as one that was not interrupted.
"""

import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from openqwen.engine import Generator, Output
from openqwen.engine.lanes import Lane, open_lane
from openqwen.engine.workers import EngineWorkers
from openqwen.instruct.synthesize.batches import BatchWork
from openqwen.instruct.synthesize.config import SynthesisConfig, open_generators
from openqwen.instruct.synthesize.journal import CallLog, Journal, ModelCall
from openqwen.instruct.synthesize.method import Batch, Item, Method, Steps, Work, item_error
from openqwen.instruct.synthesize.prompts import PromptFiles
from openqwen.instruct.synthesize.report import Report
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import whole_file, write_json
from openqwen.support.progress import Progress, console, progress
from openqwen.support.stage import StageRun

_PREPARE = object()  # the data of the item that stands for the steps before all others
_WINDOW = 4  # items at work, for each request that may be open
_SHORT = {"demonstrations": "D", "preferences": "P"}
Generators = Mapping[str, tuple[Generator, str, str]]
# (number of the item, number of the call, item, index of the call in its step, call)
Waiting = tuple[int, int, "Active", int, ModelCall]


@dataclass(eq=False)
class Active:
    """An item at work.

    number: the items' order. steps: None when it is finished. missing: answers that its current
    step waits for. answers: of that step, in order.
    """

    number: int
    item: Item
    work: Work
    steps: Steps[None] | None = None
    missing: int = 0
    answers: list[Any] = field(default_factory=list)


def synthesize(method: Method, run: StageRun, total: int | None = None) -> dict[str, float]:
    """Run a method as a stage: open its generators, write into the stage's output.

    total: number of items, for the remaining time.
    """
    config: SynthesisConfig = run.config
    generators = open_generators(config, run.inputs)
    reward = getattr(config, "reward", None)  # a folder or a hub id
    runner = Synthesis(method, generators, config, run.seed, run.output, run.scratch, reward)
    with ExitStack() as stack:
        for generator, _, _ in generators.values():
            if isinstance(generator, EngineWorkers):
                stack.enter_context(generator)
        return runner.run(total)


class Synthesis:
    """One run of a method.

    Args:
        method: what to do with each item.
        generators: "model", and "judge" and others that the method asks: each with the model's
            name, for `origin`, and an identity, for the keys of calls.
        config: limits, prompts, language.
        seed: of every random draw.
        output: an empty folder for the results.
        scratch: a folder for finished calls and items, which a later run continues from.
        reward: the folder of a reward model, if the method scores with one.
    """

    def __init__(
        self,
        method: Method,
        generators: Generators,
        config: SynthesisConfig,
        seed: int,
        output: Path,
        scratch: Path,
        reward: Path | None = None,
    ):
        self.method, self.generators, self.config, self.seed = method, generators, config, seed
        self.output, self.scratch = output, scratch
        self.prompts = PromptFiles(method.name, config.prompts)
        rewards = getattr(config, "rewards", None)
        self.batches = BatchWork(reward, rewards, scratch / "rewards.jsonl")
        self.active: deque[Active] = deque()
        self.queue: list[Waiting] = []  # a heap: calls of the earliest item first
        self.open: dict[str, list[Waiting]] = {}  # key of a call -> who waits for it
        self.numbers = count()
        self.requests = self.tokens = self.errors = 0
        self.done: list[str] = []  # ids of the items that an earlier attempt finished
        self.made: Counter[str] = Counter()
        self.stop: OpenQwenError | None = None
        self.next_start = 0.0

    def run(self, total: int | None = None) -> dict[str, float]:
        """Make everything; returns counts.

        Raises:
            OpenQwenError: a limit was reached, or the disk is full; a later run continues.
        """
        with ExitStack() as stack:
            path = self.config.limits.calls or self.scratch / "calls.jsonl"
            self.calls = CallLog(path)
            stack.callback(self.calls.close)
            self.finished = Journal(self.scratch / "finished.jsonl")
            stack.callback(self.finished.close)
            stack.callback(self.batches.close)
            self.lanes: dict[str, Lane] = {}
            for name, (generator, _, _) in self.generators.items():
                shared = [n for n in self.lanes if self.generators[n][0] is generator]
                self.lanes[name] = (
                    self.lanes[shared[0]] if shared else stack.enter_context(open_lane(generator))
                )
            most = self.config.most_items
            total = min(total, most) if total and most else total or most
            done = self._resume()
            with progress(self.method.name, total, "items", done) as bar:
                self._drive(iter([Item("prepare", _PREPARE)]), bar, prepare=True)
                items = islice(self.method.items(), most)
                self._skip(items)
                self._drive(items, bar)
            return self._write()

    def _resume(self) -> int:
        """Read the items of an earlier attempt; returns how many are finished.

        Those from the first with a failed request on are done again; so are all where prompts,
        settings or seed were others.
        """
        header = {"method": self.method.name, "seed": self.seed, "prompts": self.prompts.digests}
        header |= {"config": self.config.model_dump(mode="json")}
        for place, line in self.finished.lines():
            good = line == header if place == 0 else line is not None and not line["failures"]
            if not good:
                self.finished.cut(place)
                break
            if place:
                self.done.append(line["id"])
                self.requests += line["calls"]
                self.tokens += line["tokens"]
                self.made.update(name for name, _ in line["records"])
        if self.finished.empty:
            self.finished.append(header)
        if self.done or len(self.calls):
            note = f"  kept: {len(self.done):,} finished items, {len(self.calls):,} finished calls"
            console.print(note, style="dim")
        return len(self.done)

    def _skip(self, items: Iterator[Item]) -> None:
        """Pass the items that an earlier attempt finished."""
        for name in self.done:
            item = next(items, None)
            if item is None or item.id != name:
                do = f"remove {self.finished.path}; finished calls are kept"
                raise OpenQwenError("The items are not those of the earlier attempt.", None, do)

    def _drive(self, items: Iterator[Item], bar: Progress, prepare: bool = False) -> None:
        """Run the steps of items until all are finished."""
        most = self.config.limits.concurrency
        more = True
        while True:
            # Not more items than keep the generators busy: the first ones finish early.
            while more and len(self.queue) < most and len(self.active) < _WINDOW * most:
                if self.stop is not None:
                    break
                item = next(items, None)
                more = item is not None
                if item is not None:
                    self._start(item, prepare)
            self._commit(bar, prepare)
            self._send()
            busy = [lane for lane in set(self.lanes.values()) if lane.open]
            if self.batches.due or (self.batches and not self.queue):
                self._run_batches()
            elif busy:
                self._collect(busy)
            elif self.stop is not None:
                raise self.stop
            elif self.queue:
                time.sleep(min(0.2, max(0.0, self.next_start - time.monotonic())))
            elif not self.active and not more:
                return

    def _start(self, item: Item, prepare: bool) -> None:
        origin: dict[str, Any] = {"method": self.method.name, "seed": self.seed}
        origin["model"] = self.generators["model"][1]
        if self.generators["judge"] != self.generators["model"]:
            origin["judge"] = self.generators["judge"][1]
        work = Work(item.id, self.seed, self.prompts, self.config.language, origin)
        active = Active(next(self.numbers), item, work)
        self.active.append(active)
        if item.fault:
            work.refuse(item.fault)
            return
        active.steps = self.method.prepare(work) if prepare else self.method.steps(item, work)
        self._advance(active, None)

    def _advance(self, active: Active, value: Any) -> None:
        """Give an item's steps their answers, or an error, until they wait for others."""
        assert active.steps is not None
        try:
            if isinstance(value, OpenQwenError):
                raise value
            while True:
                step = active.steps.send(value)
                active.answers = [None] * len(step if isinstance(step, list) else step.inputs)
                active.missing = len(active.answers)
                if isinstance(step, Batch):
                    self.batches.add(step, active)
                    return
                for index, call in enumerate(step):
                    self._ask(active, index, call)
                if active.missing:
                    return
                value = active.answers
        except StopIteration:
            active.steps = None
        except OpenQwenError as error:
            if active.item.data is _PREPARE:
                raise
            self._fail(active, item_error(error))
            active.work.records.clear()
            active.steps = None

    def _ask(self, active: Active, index: int, call: ModelCall) -> None:
        """Answer a call from the log, or queue it."""
        active.work.calls += 1
        kept = self.calls.get(call.key(self.generators[call.by][2]))
        if kept is None:
            heappush(self.queue, (active.number, next(self.numbers), active, index, call))
        else:
            self._take(active, index, *kept)

    def _take(self, active: Active, index: int, answer: Output, tokens: int) -> None:
        active.answers[index] = answer
        active.missing -= 1
        active.work.tokens += tokens
        self.requests += 1
        self.tokens += tokens

    def _send(self) -> None:
        """Send queued calls while the limits allow it."""
        limits = self.config.limits
        for name, most, used in (
            ("requests", limits.requests, self.requests + len(self.open)),
            ("tokens", limits.tokens, self.tokens),
        ):
            if self.queue and most is not None and used >= most and self.stop is None:
                self.stop = self._limit(f"The limit of {most:,} {name} is reached", name)
        while self.queue and self.stop is None and len(self.open) < limits.concurrency:
            if limits.requests is not None and self.requests + len(self.open) >= limits.requests:
                return
            now = time.monotonic()
            if limits.rate is not None:
                if now < self.next_start:
                    return
                self.next_start = max(self.next_start, now - 1) + 60 / limits.rate
            waiting = heappop(self.queue)
            call = waiting[-1]
            key = call.key(self.generators[call.by][2])
            self.open.setdefault(key, []).append(waiting)
            if len(self.open[key]) == 1:
                self.lanes[call.by].submit(key, call.prompt, call.sampling, call.seed)

    def _collect(self, busy: list[Lane]) -> None:
        """Take the answers that have come, keep them, and advance their items."""
        for lane in busy:
            for tag, answer in lane.wait():
                key = str(tag)
                waiting = self.open.pop(key)
                if isinstance(answer, Output) and answer.finish_reason != "error":
                    kept = self.calls.keep(key, waiting[0][-1].prompt, answer)
                else:
                    kept = Output(finish_reason="error"), 0
                    why = "no answer" if isinstance(answer, Output) else item_error(answer)
                for _, _, active, index, _ in waiting:
                    if kept[0].finish_reason == "error":
                        self._fail(active, f"a request failed: {why}")
                    self._take(active, index, *kept)
                    if not active.missing:
                        self._advance(active, active.answers)

    def _run_batches(self) -> None:
        for active, results in self.batches.run():
            self._advance(active, results)

    def _fail(self, active: Active, reason: str) -> None:
        """Count a failed request or item; stop the run where there are too many."""
        active.work.refuse(reason)
        active.work.failures += 1
        self.errors += 1
        if self.errors > self.config.limits.errors and self.stop is None:
            self.stop = self._limit(f"{self.errors} errors, the last: {reason[:300]}", "errors")

    def _limit(self, what: str, name: str) -> OpenQwenError:
        do = f"mend the cause or raise --limits.{name}, and run the same command again: "
        do += "finished calls and items are kept"
        return OpenQwenError(f"{what}.", f"limits.{name}", do)

    def _commit(self, bar: Progress, prepare: bool) -> None:
        """Write the finished items at the head of the line."""
        while self.active and self.active[0].steps is None:
            work = self.active[0].work
            if self.stop is not None and work.failures:
                return  # to be done again
            self.active.popleft()
            line: dict[str, Any] = {"id": work.item, "failures": work.failures, "calls": work.calls}
            line |= {"tokens": work.tokens, "gates": work.gates}
            line |= {"records": work.records, "quarantine": work.quarantine}
            self.made.update(name for name, _ in work.records)
            if prepare:
                self.prepared = line | {"id": None}
                continue
            self.finished.append(line)
            notes = {_SHORT.get(name, name): self.made[name] for name in self.method.files}
            bar.advance(1, **notes, **({"errors": self.errors} if self.errors else {}))

    def _write(self) -> dict[str, float]:
        """Write the results of all finished items, in order; returns counts."""
        report = Report(self.method.name, self.method.files)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(whole_file(self.output / f"{name}.jsonl"))
                for name in (*self.method.files, "quarantine")
            }
            lines = (line for place, line in self.finished.lines() if place)
            for line in chain([self.prepared], lines):
                for name, record in report.add(line):
                    files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
        write_json(self.output / "synthesis.json", report.as_json())
        folder = self.output / "prompts"
        folder.mkdir()
        for path in self.prompts.paths.values():
            shutil.copyfile(path, folder / path.name)
        report.show()
        return report.metrics()
