"""Work that is cheaper for many items at once: grading, running programs, scoring by a reward."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openqwen.instruct.synthesize.method import Batch
from openqwen.sandbox import Pool, Program, Verdict, best_tier
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Grade, Task, grade

_FULL = 64  # inputs at which a batch does not wait for more


class Batches:
    """Waiting batches, and what does them.

    Args:
        reward: the folder of a reward model, loaded when it is first used.
    """

    def __init__(self, reward: Path | None = None):
        self._reward = reward
        self._waiting: list[tuple[Batch, Any]] = []
        self._pool: Pool | None = None
        self._score: Callable[[Sequence[Any]], list[float]] | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether there is enough work to begin."""
        return sum(len(batch.inputs) for batch, _ in self._waiting) >= _FULL

    def add(self, batch: Batch, owner: Any) -> None:
        """Queue a batch. owner: what `run` returns its results with."""
        self._waiting.append((batch, owner))

    def run(self) -> list[tuple[Any, list[Any]]]:
        """Do everything that waits: (owner, one result for each input), in the order of `add`."""
        waiting, self._waiting = self._waiting, []
        results: dict[str, list[Any]] = {}
        for kind in {batch.kind for batch, _ in waiting}:
            inputs = [one for batch, _ in waiting if batch.kind == kind for one in batch.inputs]
            results[kind] = {"grade": _grade, "run": self._run, "reward": self._rewards}[kind](
                inputs
            )
        done = []
        for batch, owner in waiting:
            own = results[batch.kind][: len(batch.inputs)]
            del results[batch.kind][: len(batch.inputs)]
            done.append((owner, own))
        return done

    def close(self) -> None:
        """End the sandbox."""
        if self._pool is not None:
            self._pool.close()

    def _run(self, programs: Sequence[Program]) -> list[Verdict]:
        if self._pool is None:
            self._pool = Pool(tier="process" if best_tier() == "process" else "strict")
        return self._pool.run(programs)

    def _rewards(self, conversations: Sequence[Any]) -> list[float]:
        if self._score is None:
            if self._reward is None:
                raise OpenQwenError("There is no reward model.", "reward", "give --reward FOLDER")
            self._score = _scorer(self._reward)
        return self._score(conversations)


def _grade(pairs: Sequence[tuple[Task, str]]) -> list[Grade]:
    return grade([task for task, _ in pairs], [answer for _, answer in pairs])


def _scorer(folder: Path) -> Callable[[Sequence[Any]], list[float]]:
    from openqwen.model import load_scorer
    from openqwen.support.device import best_device
    from openqwen.tokenizer import load_tokenizer
    from openqwen.train.reward import score

    model, tokenizer = load_scorer(folder, device=best_device()), load_tokenizer(folder)
    return lambda conversations: score(model, tokenizer, conversations)
