"""The models that graders ask: an instruct model that rates, a reward model that scores."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from openqwen.engine.generator import Generator, Sampling
from openqwen.support.errors import OpenQwenError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SAMPLING = Sampling(max_tokens=1024)
_IN_A_ROW = 3  # items that fail one after another: the fault is not theirs


class ConversationScorer(Protocol):
    """Scores conversations, as a reward model does."""

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """Score each conversation, which ends with an assistant's answer, in order."""
        ...


@dataclass(frozen=True)
class GraderModel:
    """A model for graders that ask one.

    Args:
        model: a `Generator` for the grader `judge`, a `ConversationScorer` for `reward`.
        identity: what the model is, such as the digest of its checkpoint, or a URL and a name. It
            is part of the key under which grades are cached; without it they are not cached.
        sampling: how a judge generates; part of the key too.
    """

    model: Generator | ConversationScorer
    identity: str = ""
    sampling: Sampling = _SAMPLING


def by_model(models: Sequence[GraderModel]) -> Iterator[tuple[GraderModel, list[int]]]:
    """Each model with the indices at which it stands."""
    indices: dict[int, list[int]] = {}
    for index, model in enumerate(models):
        indices.setdefault(id(model), []).append(index)
    for places in indices.values():
        yield models[places[0]], places


def ask_each(
    ask: Callable[[list[Item]], list[Result]], items: Sequence[Item]
) -> list[Result | OpenQwenError]:
    """Ask a model about all items at once; if that fails, about one after another.

    One prompt that is too long or refused must not cost the others their grades.

    Returns:
        For each item its result, or the error that it alone causes.

    Raises:
        OpenQwenError: three items in a row fail.
    """
    try:
        return list(ask(list(items)))
    except OpenQwenError:
        pass
    results: list[Result | OpenQwenError] = []
    failed = 0
    for item in items:
        try:
            results += ask([item])
            failed = 0
        except OpenQwenError as error:
            failed += 1
            if failed == _IN_A_ROW:
                raise
            results.append(error)
    return results
