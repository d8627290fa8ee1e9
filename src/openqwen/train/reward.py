"""The reward model: a decoder with one linear output, trained on preferences P with the pairwise logistic loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from openqwen.model import Packed, Scorer, save_checkpoint, scorer_from
from openqwen.support.device import best_device
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import Messages, answer, fitting, pair
from openqwen.train.losses import bradley_terry
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.rows import cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer


class RewardConfig(BaseModel):
    """One epoch at 3e-6 and batches of 64, Qwen's (2023) values; the later reports give none."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(64, gt=0, description="pairs of one optimizer step")
    max_length: int = Field(8_192, gt=1, description="pairs with a longer side are left out and counted")
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")
    train: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=3e-6), description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


@dataclass
class Sequences:
    """Whole token sequences laid end to end, to be scored at their last tokens."""

    tokens: Tensor
    positions: Tensor
    attention: Packed
    last: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> "Sequences":
        """Lay out sequences of token ids."""
        lengths = [len(s) for s in sequences]
        packed = Packed.from_lengths(lengths)
        return cls(
            tokens=torch.tensor([t for s in sequences for t in s], device=device),
            positions=packed.positions.to(device),
            attention=packed.to(device),
            last=(torch.tensor(lengths).cumsum(0) - 1).to(device),
        )

    def score(self, scorer: Scorer) -> Tensor:
        """One score for each sequence."""
        return scorer(self.tokens, self.positions, self.attention, self.last)


@torch.inference_mode()
def score_sequences(scorer: Scorer, sequences: Sequence[Sequence[int]], micro_tokens: int = 8_192) -> list[float]:
    """Scores of token sequences that end where the answer ends."""
    scores: list[float] = []
    for part in cut_to_budget([len(s) for s in sequences], micro_tokens):
        scores += Sequences.of(sequences[part], scorer.device).score(scorer).tolist()
    return scores


def score(scorer: Scorer, tokenizer: Tokenizer, conversations: Sequence[Messages]) -> list[float]:
    """Scores of conversations, each a prompt and an assistant's answer at the end."""
    ids = [list(answer(tokenizer, c[:-1], c[-1:], f"conversation {n}")[0]) for n, c in enumerate(conversations)]
    return score_sequences(scorer, ids)


def reward(
    config: RewardConfig,
    start: Path,
    preferences: Path,
    tokenizer: Tokenizer,
    output: Path,
    scratch: Path,
    seed: int,
    label: str,
) -> dict[str, float]:
    """Train a reward model from the language model at `start` on a JSONL file of preferences; save to `output`."""
    generators = Generators(seed)
    scorer = scorer_from(start, generators.torch("weights")).to(best_device())
    pairs = [
        tuple(list(ids) for ids, _ in pair(tokenizer, record, f"{preferences}, record {n}"))
        for n, record in enumerate(read_jsonl(preferences), 1)
    ]
    limit = min(config.max_length, scorer.config.max_position_embeddings)
    kept = fitting(pairs, [max(map(len, p)) for p in pairs], limit, str(preferences))
    order = Epochs(len(kept), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Sequences]:
        chosen = [kept[i] for i in order.batch(step)]
        cuts = cut_to_budget([len(c) + len(r) for c, r in chosen], config.micro_tokens)
        return [Sequences.of([side for p in chosen[c] for side in p], scorer.device) for c in cuts]

    metrics = Trainer(
        label=label,
        model=scorer,
        batch=batch,
        loss=lambda micro: bradley_terry(*micro.score(scorer).view(-1, 2).unbind(1)),
        tokens=lambda micro: len(micro.tokens),
        steps=order.steps,
        optimizer=config.train,
        save=config.save,
        scratch=scratch,
        output=output,
        generators=generators,
    ).run()
    save_checkpoint(scorer, tokenizer, output)
    return metrics | {"pairs": len(kept), "too_long": len(pairs) - len(kept)}
