"""Engines in several processes, or on a Ray cluster, that are asked as one generator.

    requests → dealt in order, a block to each worker → engines → answers, as they end

Each request brings its own seed, so an answer does not depend on the worker that gives it.
Importing this file does not load torch.
"""

import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from openqwen.engine.config import EngineConfig
from openqwen.engine.generator import Generator, Output, Prompt, Sampling
from openqwen.engine.lanes import Ended, Lane
from openqwen.engine.seeds import seed_of
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Quantization
from openqwen.support.workers import (
    WAIT,
    DeathCount,
    RetriedCall,
    WorkerCall,
    WorkerDied,
    Workers,
    WorkersConfig,
    WorkKind,
)

if TYPE_CHECKING:
    from openqwen.engine.engine import Engine
    from openqwen.support.progress import Progress

_GREEDY, _DEFAULTS = Sampling(), EngineConfig()
_AHEAD = 2  # calls of a worker at once: it begins the next one while the last one's result travels


@dataclass(frozen=True)
class EngineSource:
    """The checkpoint that an engine is loaded from. version: the number of the weights."""

    path: Path
    quantize: Quantization | None = None
    config: EngineConfig = _DEFAULTS
    version: int = 0

    def load(self) -> "Engine":
        """Load the engine, onto the best device that can hold such weights."""
        from openqwen.engine.engine import Engine
        from openqwen.model import load_model
        from openqwen.support.device import best_device
        from openqwen.tokenizer import load_tokenizer

        device = "cpu" if self.quantize and best_device().type != "cuda" else best_device()
        model = load_model(self.path, device=device, quantize=self.quantize)
        return Engine(model, load_tokenizer(self.path), self.config)


class EngineWorkers(Generator):
    """Engines in worker processes. They are started when they are first asked.

    An engine computes float weights in blocks that depend on its CPUs and on the requests that run
    together. So the last digits of its log-probabilities may differ from those of one engine, as
    they do at another concurrency, and with them a token that is as likely as another one.

    Args:
        source: what each worker loads; all machines must see it at that path.
        kind, config: the workers.
        concurrency: most requests at once, over all workers; by default what their engines take.
    """

    def __init__(
        self,
        source: EngineSource,
        kind: WorkKind,
        config: WorkersConfig,
        concurrency: int | None = None,
    ):
        self.source, self._kind, self._config = source, kind, config
        self._concurrency = concurrency

    @cached_property
    def workers(self) -> Workers:
        """The workers, each with an `EngineHost`."""
        return Workers(EngineHost, self._kind, self._config, engines=True)

    @property
    def concurrency(self) -> int:
        """Most requests at once, over all workers."""
        return self._concurrency or 2 * self.source.config.max_running * len(self.workers)

    @cached_property
    def longest(self) -> int:
        """Most tokens of one sequence, prompt and answer; see `Engine.longest`."""
        call = RetriedCall(self.workers, 0, "loading the model", "longest", self.source)
        tokens: int = call.wait()
        return tokens

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _GREEDY,
        seeds: Sequence[int] | None = None,
        progress: "Progress | None" = None,
    ) -> list[Output]:
        """Answer every prompt, in order; see `Generator.generate`."""
        outputs = [Output() for _ in prompts]
        with self.lane() as lane:
            for number, prompt in enumerate(prompts):
                seed = seed_of(sampling.seed, number) if seeds is None else seeds[number]
                lane.submit(number, prompt, sampling, seed)
            while lane.open:
                for tag, answer in lane.wait():
                    if isinstance(answer, OpenQwenError):
                        raise answer
                    outputs[int(str(tag))] = answer
                    if progress:
                        progress.advance(1)
        return outputs

    def lane(self) -> "WorkersLane":
        """Requests whose answers come one by one."""
        return WorkersLane(self)

    def close(self) -> None:
        """End the workers."""
        if "workers" in self.__dict__:
            self.workers.close()

    def __enter__(self) -> "EngineWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EngineHost:
    """The engine of one worker, and the requests that it works on."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._source: EngineSource | None = None
        self._lane: Lane

    def longest(self, source: EngineSource) -> int:
        """See `Engine.longest`."""
        return self._loaded(source).longest

    def advance(
        self, source: EngineSource, requests: Sequence[tuple[int, Prompt, Sampling, int]]
    ) -> Ended:
        """Take requests, and work until one or more of all have ended, or a moment has passed.

        Returns:
            The numbers of those that ended, with their answers or errors.
        """
        self._loaded(source)
        for request in requests:
            self._lane.submit(*request)
        ended: Ended = []
        until = time.monotonic() + WAIT
        while self._lane.open and not ended and time.monotonic() < until:
            ended = self._lane.wait()
        return [(n, a.detached() if isinstance(a, Output) else a) for n, a in ended]

    def cancel(self) -> None:
        """Cancel all requests."""
        if self._engine:
            self._lane.close()
            self._lane = self._engine.lane()

    def _loaded(self, source: EngineSource) -> "Engine":
        """The engine with the weights of the source."""
        if self._engine is None:
            self._engine = source.load()
            self._engine.refresh(source.version)
            self._lane = self._engine.lane()
        elif source != self._source:
            from openqwen.model import load_model

            self._engine.replace_weights(load_model(source.path), source.version)
        self._source = source
        return self._engine


@dataclass(eq=False)
class _OpenRequest:
    """A request, and how often a worker died that worked on it."""

    tag: Hashable
    request: tuple[Prompt, Sampling, int]
    deaths: DeathCount = field(default_factory=lambda: DeathCount("a request"))


@dataclass(eq=False)
class _Desk:
    """What one worker is at: its open requests by their numbers, and its calls, in order."""

    open: dict[int, _OpenRequest] = field(default_factory=dict)
    calls: deque[WorkerCall] = field(default_factory=deque)


class WorkersLane(Lane):
    """Requests to the engines of several workers. There is one lane at a time."""

    def __init__(self, generator: EngineWorkers):
        self._owner = generator
        self._queue: deque[_OpenRequest] = deque()
        self._numbers = count()
        self._desks: list[_Desk] = []

    @property
    def open(self) -> int:
        return len(self._queue) + sum(len(desk.open) for desk in self._desks)

    def submit(self, tag: Hashable, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        self._queue.append(_OpenRequest(tag, (prompt, sampling, seed)))

    def wait(self) -> Ended:
        self._deal()
        if calls := [desk.calls[0].future for desk in self._desks if desk.calls]:
            wait(calls, WAIT, FIRST_COMPLETED)
        else:
            self._owner.workers.wait_for_one()
        ended: Ended = []
        for desk in self._desks:
            while desk.calls and desk.calls[0].future.done():
                ended += self._take(desk, desk.calls.popleft())
        self._deal()
        return ended

    def close(self) -> None:
        for place, desk in enumerate(self._desks):
            if desk.open:
                self._owner.workers.call(place, "cancel")

    def _deal(self) -> None:
        """Give each worker its share, in blocks of requests that may begin alike."""
        workers = self._owner.workers
        self._desks = self._desks or [_Desk() for _ in range(len(workers))]
        share = -(-min(self.open, self._owner.concurrency) // len(workers))
        for place, desk in enumerate(self._desks):
            if len(desk.calls) == _AHEAD or not workers.ready(place):
                continue
            room = min(share - len(desk.open), len(self._queue))
            new = {}
            if room >= min(max(1, share // 8), len(self._queue)):
                new = {next(self._numbers): self._queue.popleft() for _ in range(room)}
            desk.open |= new
            if desk.open:
                requests = [(number, *asked.request) for number, asked in new.items()]
                call = workers.call(place, "advance", self._owner.source, requests)
                desk.calls.append(call)

    def _take(self, desk: _Desk, call: WorkerCall) -> Ended:
        """The answers of a call. If its worker died, its open requests are queued again."""
        try:
            return [(desk.open.pop(number).tag, answer) for number, answer in call.result()]
        except WorkerDied as death:
            self._owner.workers.replace(call, death)
            ended: Ended = []
            owed = list(desk.open.values())
            desk.open.clear()
            desk.calls.clear()  # they were for the same worker
            for asked in reversed(owed):
                try:
                    asked.deaths.add(death)
                    self._queue.appendleft(asked)
                except OpenQwenError as error:
                    ended.append((asked.tag, error))
            return ended
