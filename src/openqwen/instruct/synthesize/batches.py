"""Work that is cheaper for many items at once: grading, running programs, scoring by a reward."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from openqwen.engine import Output
from openqwen.engine.score import RewardModel
from openqwen.instruct.synthesize.method import Batch
from openqwen.sandbox import Pool, Program, RemotePool, Verdict, open_pool
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.tasks import grade
from openqwen.train.reward_sources import RewardSources, RewardSourcesConfig

_FULL = 64  # inputs at which work does not wait for more
_LONGEST_WAIT = 5.0  # seconds that work waits for more


class BatchWork:
    """Waiting batches, and what does them.

    Args:
        reward: the folder of a reward model, loaded when it is first used.
        rewards: sources of rewards in place of that model alone, where it names any.
        faults: a file that gets what has no reward.
    """

    def __init__(
        self,
        reward: Path | None = None,
        rewards: RewardSourcesConfig | None = None,
        faults: Path = Path("rewards.jsonl"),
    ):
        self._reward, self._rewards_config, self._faults = reward, rewards, faults
        self._waiting: list[tuple[Batch, Any]] = []
        self._since = 0.0  # when the first of them came
        self._pool: Pool | RemotePool | None = None
        self._score: Callable[[Sequence[Any]], list[float]] | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def due(self) -> bool:
        """Whether there is enough work to begin, or some has waited long enough."""
        if not self._waiting:
            return False
        enough = sum(len(batch.inputs) for batch, _ in self._waiting) >= _FULL
        return enough or time.monotonic() - self._since > _LONGEST_WAIT

    def add(self, batch: Batch, owner: Any) -> None:
        """Queue a batch. owner: what `run` returns its results with."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append((batch, owner))

    def run(self) -> list[tuple[Any, list[Any] | OpenQwenError]]:
        """Do everything that waits, in the order of `add`.

        Returns:
            Each owner, with one result for each input, or with the error of its batch alone.
        """
        waiting, self._waiting = self._waiting, []
        done: list[tuple[Any, list[Any] | OpenQwenError]] = []
        for kind in dict.fromkeys(batch.kind for batch, _ in waiting):
            group = [(batch, owner) for batch, owner in waiting if batch.kind == kind]
            try:
                results = iter(
                    self._work(kind, [one for batch, _ in group for one in batch.inputs])
                )
                done += [(owner, list(islice(results, len(b.inputs)))) for b, owner in group]
            except OpenQwenError:  # of one of them: find out of which
                done += [(owner, self._alone(batch)) for batch, owner in group]
        return done

    def _alone(self, batch: Batch) -> list[Any] | OpenQwenError:
        try:
            return self._work(batch.kind, batch.inputs)
        except OpenQwenError as error:
            return error

    def _work(self, kind: str, inputs: Sequence[Any]) -> list[Any]:
        if kind == "grade":
            return grade([task for task, _ in inputs], [answer for _, answer in inputs])
        return self._run(inputs) if kind == "run" else self._rewards(inputs)

    def close(self) -> None:
        """End the sandbox."""
        if self._pool is not None:
            self._pool.close()

    def _run(self, programs: Sequence[Program]) -> list[Verdict]:
        if self._pool is None:
            self._pool = open_pool()
        return self._pool.run(programs)

    def _rewards(self, conversations: Sequence[Any]) -> list[float]:
        if self._score is None:
            if self._rewards_config and self._rewards_config.sources:
                self._score = self._sources(self._rewards_config)
            elif self._reward is None:
                raise OpenQwenError("There is no reward model.", "reward", "give --reward FOLDER")
            else:
                self._score = RewardModel.load(self._reward).score
        return self._score(conversations)

    def _sources(self, config: RewardSourcesConfig) -> Callable[[Sequence[Any]], list[float]]:
        """What scores conversations by several sources; NaN where they give no reward."""
        model = local(self._reward) if self._reward else None
        sources = RewardSources(config, None, self._faults, model)

        def score(conversations: Sequence[Any]) -> list[float]:
            records = [{"prompt": messages[:-1]} for messages in conversations]
            return sources(records, [Output(messages[-1]["content"]) for messages in conversations])

        return score
