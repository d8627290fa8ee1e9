"""Answers: what a person says about the responses to one instruction.

On the page a response is a slot ("A", "B", ... by its place on the screen), in the log and in
exports it is its number in the task. The order shown translates between the two.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openqwen.http.errors import ApiError
from openqwen.instruct.collaborate.settings import ProjectConfig

Answer = dict[str, Any]  # as it is stored: the fields of `AnswerBody`, responses as numbers

SLOTS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_COMMENT = 10_000  # characters
LONGEST_TEXT = 100_000
_EMPTY: Answer = {
    "ranks": [],
    "none_good": False,
    "scores": {},
    "flags": {},
    "comment": "",
    "demonstration": None,
}


class DemonstrationBody(BaseModel):
    """A response that a person has edited or written. from: the slot that it began as."""

    model_config = ConfigDict(extra="forbid")

    from_: str | None = Field(None, alias="from")
    text: str = Field(max_length=LONGEST_TEXT)


class AnswerBody(BaseModel):
    """An answer or a draft from the page.

    ranks: tiers of slots, best first. scores: slot -> criterion -> number. flags: slot -> flags.
    """

    model_config = ConfigDict(extra="forbid")

    ranks: list[list[str]] = Field([], max_length=len(SLOTS))
    none_good: bool = False
    scores: dict[str, dict[str, float]] = {}
    flags: dict[str, list[str]] = {}
    comment: str = Field("", max_length=LONGEST_COMMENT)
    demonstration: DemonstrationBody | None = None


def stored(body: AnswerBody, order: Sequence[int], project: ProjectConfig) -> Answer:
    """The fields that were given, responses as numbers.

    Raises:
        ApiError: an unknown slot, criterion or flag, or a slot that is ranked twice.
    """
    numbers = {SLOTS[place]: number for place, number in enumerate(order)}

    def number(slot: str, param: str) -> int:
        if slot not in numbers:
            raise _invalid(f"There is no response {slot[:20]!r}.", param)
        return numbers[slot]

    ranked = [slot for tier in body.ranks for slot in tier]
    if len(set(ranked)) < len(ranked):
        raise _invalid("A response is ranked twice.", "ranks")
    for param, given, known in (
        ("flags", body.flags, {flag.id for flag in project.flags}),
        ("scores", body.scores, {criterion.id for criterion in project.criteria}),
    ):
        if unknown := {name for names in given.values() for name in names} - known:
            raise _invalid(f"The project has no {min(unknown)[:40]!r}.", param)
    for criterion in project.criteria:
        scores = [score[criterion.id] for score in body.scores.values() if criterion.id in score]
        if any(not criterion.low <= score <= criterion.high for score in scores):
            span = f"{criterion.low} to {criterion.high}"
            raise _invalid(f"A score of {criterion.id!r} is not in {span}.", "scores")
    answer = body.model_dump(by_alias=True)
    answer["ranks"] = [sorted(number(s, "ranks") for s in tier) for tier in body.ranks if tier]
    for param in ("scores", "flags"):
        # Sorted, so that equal answers are equal texts whatever the order on the page.
        entries = sorted((number(s, param), v) for s, v in answer[param].items() if v)
        answer[param] = {str(n): sorted(v) if param == "flags" else v for n, v in entries}
    if (written := answer["demonstration"]) and written["from"] is not None:
        written["from"] = number(written["from"], "demonstration")
    return {name: answer[name] for name in body.model_fields_set}


def check_complete(answer: Answer, count: int, project: ProjectConfig) -> Answer:
    """The answer with all fields; ApiError 400 where something is missing for an answer."""
    answer = _EMPTY | answer
    ranks = answer["ranks"]
    ranked, wanted = sum(map(len, ranks)), count
    if project.best is not None:
        wanted = min(project.best, count)
    if ranked < wanted:
        what = "all responses" if wanted == count else f"at least the best {wanted}"
        raise _invalid(f"Rank {what}; {ranked} are ranked.", "ranks")
    if not project.ties and any(len(tier) > 1 for tier in ranks):
        raise _invalid("This project has no ties: give each response a rank of its own.", "ranks")
    written = answer["demonstration"]
    if project.demonstrations == "off" and written:
        raise _invalid("This project takes no demonstrations.", "demonstration")
    text = written["text"].strip() if written else ""
    if written and not text:
        raise _invalid("The demonstration is empty.", "demonstration")
    if project.demonstrations == "required" and not text and not answer["none_good"]:
        raise _invalid(
            "Write the demonstration, or mark that no response is good.", "demonstration"
        )
    return answer


def shown(answer: Answer, order: Sequence[int]) -> dict[str, Any]:
    """A stored answer with the responses as slots."""
    slots = {number: SLOTS[place] for place, number in enumerate(order)}
    result = renamed(answer, lambda number: slots[number])
    if "ranks" in result:
        result["ranks"] = [sorted(tier) for tier in result["ranks"]]
    return result


def renamed(answer: Answer, name: Callable[[int], str]) -> dict[str, Any]:
    """A stored answer with other names for its responses."""
    result = dict(answer)
    if "ranks" in answer:
        result["ranks"] = [[name(number) for number in tier] for tier in answer["ranks"]]
    for field in ("scores", "flags"):
        if field in answer:
            result[field] = {name(int(number)): v for number, v in answer[field].items()}
    if (written := answer.get("demonstration")) and written["from"] is not None:
        result["demonstration"] = written | {"from": name(written["from"])}
    return result


def tiers(ranks: Sequence[Sequence[int]], count: int) -> list[int]:
    """The tier of each response, 0 the best; responses that are not ranked share the last."""
    places = [len(ranks)] * count
    for tier, numbers in enumerate(ranks):
        for number in numbers:
            places[number] = tier
    return places


def preference(ranks: Sequence[Sequence[int]], count: int) -> dict[tuple[int, int], int]:
    """For each pair (a, b), a < b: 1 where a is better, -1 where b is, 0 for a tie.

    Two responses that were both left out of a ranking of the best were not compared.
    """
    places = tiers(ranks, count)
    out = len(ranks)
    return {
        (a, b): (places[a] < places[b]) - (places[a] > places[b])
        for a in range(count)
        for b in range(a + 1, count)
        if not places[a] == places[b] == out
    }


def mean_ranks(ranks: Sequence[Sequence[int]], count: int) -> list[float]:
    """The rank of each response from 1; those that share a rank get its mean (midrank)."""
    places = tiers(ranks, count)
    return [
        1 + sum(other < place for other in places) + (sum(o == place for o in places) - 1) / 2
        for place in places
    ]


def check_ranks(ranks: Any, count: int) -> list[list[int]]:
    """Ranks by numbers, such as those of a gold task; ValueError where they are none."""
    if not isinstance(ranks, list) or not all(isinstance(tier, list) for tier in ranks):
        raise ValueError("ranks are lists of response numbers, best first")
    numbers = [number for tier in ranks for number in tier]
    if any(type(number) is not int or not 0 <= number < count for number in numbers):
        raise ValueError(f"ranks name responses by numbers from 0 to {count - 1}")
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError("ranks name each response once")
    return [sorted(tier) for tier in ranks if tier]


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, message, f"answer.{param}", "invalid_answer")
