"""Preferences P as DPO and the reward model read them: gathered by prompt, the too long ones left out and counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from openqwen.support.records import read_records
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import Compared, compared, fitting, origin, pair
from openqwen.train.rows import cut_to_budget
from openqwen.train.trainer import TrainingConfig


class PreferencesConfig(TrainingConfig):
    """How preferences are read."""

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(64, gt=0, description="prompts of one optimizer step, each with all its pairs")
    max_length: int = Field(8_192, gt=1, description="prompts with a longer answer are left out and counted")
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")


@dataclass
class Preferences:
    """Prompts with their compared answers; too_long: how many were left out."""

    groups: list[Compared]
    too_long: int

    @classmethod
    def read(
        cls, path: Path, tokenizer: Tokenizer, config: PreferencesConfig, window: int, hottest: float | None = None
    ) -> "Preferences":
        """Those of a source (see `read_records`) whose answers fit both the configured length and the network's window.

        hottest: pairs whose wrong answer was sampled at a higher temperature are left out, uncounted.
        """
        groups = compared(
            pair(tokenizer, record, where)
            for where, record in read_records(path)
            if hottest is None or origin(record).get("temperature", 0.0) <= hottest
        )
        limit = min(config.max_length, window)
        kept = fitting(groups, [group.longest for group in groups], limit, str(path))
        return cls(kept, len(groups) - len(kept))

    def cut(self, numbers: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
        """Numbers of prompts, cut into micro-batches."""
        for cut in cut_to_budget([self.groups[i].size for i in numbers], micro_tokens):
            yield list(numbers[cut])

    @property
    def counts(self) -> dict[str, float]:
        """For the metrics."""
        pairs = sum(len(group.pairs) for group in self.groups)
        return {"pairs": pairs, "prompts": len(self.groups), "too_long": self.too_long}
