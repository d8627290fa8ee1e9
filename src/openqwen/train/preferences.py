"""Preferences P as DPO and the reward model read them: gathered by prompt, the too long ones left
out and counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.support.errors import OpenQwenError
from openqwen.support.records import read_records
from openqwen.support.stage import CONVERSATION, Effort
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import (
    PreferenceGroup,
    encode_preference,
    fitting,
    group_by_prompt,
    origin,
)
from openqwen.train.packing import MicroBatchConfig
from openqwen.train.rows import cut_to_budget
from openqwen.train.trainer import TrainingConfig

# For estimates: tokens of a prompt with its compared answers; not every prompt has a right and a
# wrong one.
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
class Preferences:
    """Prompts with their compared answers. too_long: prompts left out. too_hot: pairs left out."""

    groups: list[PreferenceGroup]
    too_long: int
    too_hot: int = 0

    @classmethod
    def read(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        config: PreferencesConfig,
        window: int,
        hottest: float | None = None,
    ) -> "Preferences":
        """Those of a source (see `read_records`) whose answers fit both the configured length and
        the network's window.

        hottest: pairs with an answer that was sampled at a higher temperature are left out.
        """
        records = list(read_records(path))
        cool = [(where, r) for where, r in records if hottest is None or _temperature(r) <= hottest]
        if records and not cool:
            raise OpenQwenError(
                f"All {len(records)} pairs have an answer sampled above temperature {hottest}.",
                where=path,
                do="raise hottest, or leave it out",
            )
        groups = group_by_prompt(
            encode_preference(tokenizer, record, where) for where, record in cool
        )
        limit = min(config.max_length, window)
        kept = fitting(groups, [group.longest for group in groups], limit, str(path))
        return cls(kept, len(groups) - len(kept), len(records) - len(cool))

    def cut(self, numbers: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
        """Numbers of prompts, cut into micro-batches."""
        for cut in cut_to_budget([self.groups[i].size for i in numbers], micro_tokens):
            yield list(numbers[cut])

    @property
    def counts(self) -> dict[str, float]:
        """For the metrics."""
        pairs = sum(len(group.pairs) for group in self.groups)
        left_out = {"too_long": self.too_long, "too_hot": self.too_hot}
        return {"pairs": pairs, "prompts": len(self.groups), **left_out}


def _temperature(record: dict[str, Any]) -> float:
    """The higher of the two answers' temperatures in a pair's origin; 0 where there is none."""
    told = origin(record)
    return max(told.get(key) or 0.0 for key in ("temperature", "chosen_temperature"))


def preferences_effort(recipe: Any, config: PreferencesConfig, passes: float) -> Effort:
    """To train so many times on the preferences that a recipe makes."""
    rows = {CONVERSATION: recipe.prefer.prompts * COMPARED * passes}
    longest = config.max_length
    return Effort(
        rows=rows,
        micro_tokens=max(config.micro_tokens, longest),
        longest=longest,
        data_from="prefer",
    )
