"""Comparisons of answers, as the reward model learns them from preferences P.

A record is a preference in any form; `chosen` and `rejected` may each be a list of answers. It may
say more:

    criteria   {name: number}: which side is better by a criterion. Above 0: the chosen one, below:
               the rejected one; 0: they are alike. "overall" stands for the reward itself, and is 1
               where it is not given.
    margin     how far the better answer's reward must be above the other's; or {name: number}.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.progress import notice
from openqwen.support.records import Record, read_records
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import encode_sides
from openqwen.train.packed_batch import Sample
from openqwen.train.preferences import PreferenceGroup, Preferences, PreferencesConfig
from openqwen.train.token_cache import TokenCache, encode_records
from openqwen.train.trainer import Place

OVERALL = "overall"
_WORDS = {"chosen": 1, "rejected": -1, "tie": 0}


# The number of a criterion (−1: the reward), the side of a pair that is better by it, the margin.
Judgement = tuple[int, int, float]


class Comparison(NamedTuple):
    """Two answers, by their numbers, of which the first is better by a criterion (−1: reward)."""

    chosen: int
    rejected: int
    criterion: int
    margin: float


@dataclass
class ComparedAnswers(PreferenceGroup):
    """A prompt, its answers, and what is known about them."""

    comparisons: list[Comparison] = field(default_factory=list)


def judgements(record: Record, criteria: Collection[str], where: str) -> list[Judgement]:
    """What a record says about its sides. Without names of criteria its own are not read."""
    given = record.get("criteria") or {}
    margins = record.get("margin") or {}
    if not isinstance(given, Mapping):
        raise OpenQwenError(f"'criteria' is {given!r}.", where, "give {name: number}")
    if not isinstance(margins, Mapping):
        margins = {OVERALL: margins}
    found = []
    numbers = {name: number for number, name in enumerate(criteria)} | {OVERALL: -1}
    for name, value in ({OVERALL: 1} | dict(given)).items():
        if name not in numbers and criteria:
            what = f"The reward model has no criterion '{name}'.{suggestion(name, numbers)}"
            raise OpenQwenError(what, where, "add it to reward.criteria, or leave it out")
        sign = _number(_WORDS.get(str(value), value), f"{where}, criteria.{name}")
        margin = _number(margins.get(name, 0), f"{where}, margin of {name}")
        if sign and name in numbers:
            found.append((numbers[name], int(sign < 0), margin))
    return found


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OpenQwenError(f"This is {value!r}, not a number.", where)
    return float(value)


class Comparisons(Preferences):
    """The comparisons of a source, gathered by prompt; see `Preferences`."""

    def __init__(self, cache: TokenCache, limit: int, where: Path, said: list[list[Judgement]]):
        self._said = said  # by record
        super().__init__(cache, limit, where)
        self.counts = {name: n for name, n in self.counts.items() if name != "too_hot"}
        self.counts |= {name: cache.counts[name] for name in ("equal", "undecided")}

    @classmethod
    def of(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        config: PreferencesConfig,
        criteria: Collection[str],
        window: int,
        place: Place,
    ) -> "Comparisons":
        """The comparisons of a source whose answers fit; see `Preferences.read`.

        criteria: the names of the reward model's criteria; see `judgements`.
        """

        def encode(record: Record, where: str, counts: Counter[str]) -> Sequence[Sample]:
            counts["unread"] += bool(record.get("criteria")) and not criteria
            if not judgements(record, criteria, where):
                counts["undecided"] += 1
                return ()
            samples: list[Sample] = []
            for better, worse in product(*encode_sides(tokenizer, record, where)):
                if better[0] == worse[0]:
                    counts["equal"] += 1
                else:
                    samples += better, worse
            return samples

        folder, label = place.scratch / "preferences", f"{place.label} tokens"
        settings = {"criteria": list(criteria)}
        cache = encode_records(path, tokenizer, encode, folder, label, settings)
        if cache.counts["records"] and not len(cache):
            what = f"None of the {cache.counts['records']} records compares two different answers."
            raise OpenQwenError(what, path, "give answers of which one is better")
        if unread := cache.counts["unread"]:
            notice(f"the criteria of {unread} records are not read: give reward.criteria", path)
        said = [judgements(record, criteria, where) for where, record in read_records(path)]
        return cls(cache, min(config.max_length, window), path, said)

    def __getitem__(self, index: int) -> ComparedAnswers:
        return self._group(self._members[index])

    def _group(self, pairs: Sequence[int]) -> ComparedAnswers:
        plain = super()._group(pairs)
        found = []
        for pair in pairs:
            sides = [self._cache[2 * pair + side][0][len(plain.prompt) :] for side in (0, 1)]
            numbers = [plain.answers.index(side.tolist()) for side in sides]
            for criterion, better, margin in self._said[self._cache.records[2 * pair] - 1]:
                chosen, rejected = numbers[better], numbers[1 - better]
                found.append(Comparison(chosen, rejected, criterion, margin))
        comparisons = list(dict.fromkeys(found))
        return ComparedAnswers(plain.prompt, plain.answers, plain.pairs, comparisons)
