"""Preferences P as DPO and the reward model read them: pairs of answers, gathered by prompt."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openqwen.support.batching import cut_to_budget
from openqwen.support.errors import OpenQwenError
from openqwen.support.records import Record
from openqwen.support.stage import CONVERSATION, Effort
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import check_some_fit, encode_preference, origin
from openqwen.train.packed_batch import Sample
from openqwen.train.packing import MicroBatchConfig
from openqwen.train.token_cache import TokenCache, encode_records
from openqwen.train.trainer import Place, TrainingConfig

# For estimates: the tokens of a prompt with its answers, averaged over all prompts, of which some
# have no right or no wrong answer.
COMPARED = 40


class PreferencesConfig(MicroBatchConfig, TrainingConfig):
    """How preferences are read."""

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(
        64, gt=0, description="prompts of one optimizer step, each with all its pairs"
    )
    max_length: int = Field(
        8_192, gt=1, description="prompts with a longer answer are left out and counted"
    )


@dataclass
class PreferenceGroup:
    """A prompt and its different answers as token ids. pairs: indices (chosen, rejected)."""

    prompt: list[int]
    answers: list[list[int]] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens, the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))

    def add(self, chosen: list[int], rejected: list[int]) -> None:
        """Add a pair; one that is there already is not added again."""
        for answer in (chosen, rejected):
            if answer not in self.answers:
                self.answers.append(answer)
        pair = self.answers.index(chosen), self.answers.index(rejected)
        if pair not in self.pairs:
            self.pairs.append(pair)

    def to_first_difference(self) -> "PreferenceGroup":
        """The same pairs, each answer cut behind the first token at which the two differ.

        As in Step-DPO (Lai et al. 2024): the log-probabilities of the tokens that both answers
        share cancel in the loss, and tokens behind a wrong answer's first error do not count.
        """
        group = PreferenceGroup(self.prompt)
        for pair in self.pairs:
            chosen, rejected = (self.answers[index] for index in pair)
            differing = [n for n, (a, b) in enumerate(zip(chosen, rejected)) if a != b]
            end = differing[0] + 1 if differing else None  # None: one answer begins the other
            group.add(chosen[:end], rejected[:end])
        return group


def group_by_prompt(pairs: Iterable[tuple[Sample, Sample]]) -> list[PreferenceGroup]:
    """Groups of pairs (prompt with chosen answer, prompt with rejected answer), in order."""
    groups: dict[tuple[int, ...], PreferenceGroup] = {}
    for (chosen, mask), (rejected, _) in pairs:
        start = int(np.argmax(mask))  # the first target
        prompt, *answers = (
            np.asarray(ids).tolist() for ids in (chosen[:start], chosen[start:], rejected[start:])
        )
        groups.setdefault(tuple(prompt), PreferenceGroup(prompt)).add(*answers)
    return list(groups.values())


def pair_indices(groups: Sequence[PreferenceGroup]) -> Tensor:
    """The chosen and the rejected answer of every pair, [pairs, 2]: indices over all groups."""
    starts = accumulate((len(group.answers) for group in groups), initial=0)
    return torch.tensor(
        [(start + c, start + r) for start, group in zip(starts, groups) for c, r in group.pairs]
    )


class Preferences:
    """The groups of a source, in the order in which their prompts first occur.

    A group is put together from the token cache when it is asked for; what stays in memory is a
    few numbers for each pair and group.

    sizes: tokens of each group. answers: its answers. counts: for the metrics.
    """

    def __init__(self, cache: TokenCache, limit: int, where: Path, first_difference: bool = False):
        self._cache, self._first_difference = cache, first_difference
        self._members: list[array] = []  # the pairs of each group
        longest, sizes, answers, pairs = array("q"), array("q"), array("q"), 0
        for members in _pairs_by_prompt(cache):
            group = self._group(members)
            longest.append(group.longest)
            if group.longest > limit:
                continue
            if first_difference:
                group = group.to_first_difference()
            self._members.append(members)
            sizes.append(group.size)
            answers.append(len(group.answers))
            pairs += len(group.pairs)
        check_some_fit(longest, limit, where)
        self.sizes, self.answers = np.array(sizes), np.array(answers)
        self.counts: dict[str, float] = {"pairs": pairs, "prompts": len(self)}
        too_long = len(longest) - len(self)
        self.counts |= {"too_long": too_long, "too_hot": cache.counts["too_hot"]}
        self.counts["equal"] = cache.counts["equal"]

    @classmethod
    def read(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        config: PreferencesConfig,
        window: int,
        place: Place,
        hottest: float | None = None,
        first_difference: bool = False,
    ) -> "Preferences":
        """The groups of a source (see `read_records`) whose answers fit.

        Args:
            window: the most tokens that the network reads; `config.max_length` is the other limit.
            place: the samples are cached in its `scratch`.
            hottest: leave out pairs with an answer that was sampled at a higher temperature.
            first_difference: see `PreferenceGroup.to_first_difference`.

        Raises:
            OpenQwenError: a record cannot be read, or no record is left.
        """

        def encode(record: Record, where: str, counts: Counter[str]) -> Sequence[Sample]:
            if hottest is not None and _temperature(record) > hottest:
                counts["too_hot"] += 1
                return ()
            sides = encode_preference(tokenizer, record, where)
            if list(sides[0][0]) == list(sides[1][0]):
                counts["equal"] += 1
                return ()
            return sides

        folder, label = place.scratch / "preferences", f"{place.label} tokens"
        cache = encode_records(path, tokenizer, encode, folder, label, {"hottest": hottest})
        if cache.counts["equal"] == cache.counts["records"] > 0:
            what = f"Both answers are the same in all {cache.counts['equal']} pairs."
            raise OpenQwenError(what, where=path, do="look at chosen and rejected in the data")
        if cache.counts["too_hot"] == cache.counts["records"] > 0:
            raise OpenQwenError(
                f"All {cache.counts['records']} pairs have an answer sampled above temperature"
                f" {hottest}.",
                where=path,
                do="raise hottest, or leave it out",
            )
        return cls(cache, min(config.max_length, window), path, first_difference)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> PreferenceGroup:
        group = self._group(self._members[index])
        return group.to_first_difference() if self._first_difference else group

    def __iter__(self) -> Iterator[PreferenceGroup]:
        return (self[index] for index in range(len(self)))

    def cut(self, chosen: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
        """Cut indices of groups into micro-batches."""
        for cut in cut_to_budget([self.sizes[index] for index in chosen], micro_tokens):
            yield list(chosen[cut])

    def _group(self, pairs: Sequence[int]) -> PreferenceGroup:
        (group,) = group_by_prompt((self._cache[2 * n], self._cache[2 * n + 1]) for n in pairs)
        return group


def _pairs_by_prompt(cache: TokenCache) -> list[array]:
    """The pairs of each prompt, in order of their first pair. Pair n is samples 2n and 2n + 1."""
    members: dict[bytes, array] = {}
    for pair in range(len(cache) // 2):
        ids, mask = cache[2 * pair]
        prompt = np.asarray(ids[: np.argmax(mask)], np.uint32).tobytes()
        members.setdefault(prompt, array("q")).append(pair)
    return list(members.values())


def _temperature(record: Record) -> float:
    """The higher of the two answers' temperatures in a pair's origin; 0 where there is none."""
    given = origin(record)
    return max(given.get(key) or 0.0 for key in ("temperature", "chosen_temperature"))


def preferences_effort(recipe: Any, config: PreferencesConfig, passes: float) -> Effort:
    """The effort of so many passes over the preferences that a recipe makes."""
    rows = {CONVERSATION: recipe.prefer.prompts * COMPARED * passes}
    longest = config.max_length
    return Effort(
        rows=rows,
        micro_tokens=max(config.micro_tokens, longest),
        longest=longest,
        data_from="prefer",
    )
