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
from openqwen.train.branches import branches
from openqwen.train.conversations import Compared, Messages, answer, compared, fitting, pair, pair_numbers
from openqwen.train.losses import Loss, bradley_terry
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.rows import Rows, cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer


class RewardConfig(BaseModel):
    """One epoch at 3e-6 and batches of 64, Qwen's (2023) values; the later reports give none."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(64, gt=0, description="prompts of one optimizer step, each with all its pairs")
    max_length: int = Field(8_192, gt=1, description="prompts with a longer answer are left out and counted")
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


@dataclass
class Answers:
    """Answers behind their prompts, scored at their last tokens and compared. last: [answers]. pairs: [pairs, 2]."""

    rows: Rows
    last: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, groups: Sequence[Compared], device: torch.device) -> "Answers":
        """Lay out groups."""
        # An answer's last token is fed only where another stands behind it: any one will do.
        fed = [(group.prompt, [[*answer, answer[-1]] for answer in group.answers]) for group in groups]
        rows = branches(fed, device)
        ends = torch.tensor(rows.counts, device=device).cumsum(0) - 1
        return cls(rows, rows.learned[ends], pair_numbers(groups).to(device))

    def loss(self, scorer: Scorer) -> Loss:
        """The pairwise logistic loss."""
        scores = scorer(self.rows.tokens, self.rows.positions, self.rows.attention, self.last)
        return bradley_terry(*scores[self.pairs].unbind(1))


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
        pair(tokenizer, record, f"{preferences}, record {n}") for n, record in enumerate(read_jsonl(preferences), 1)
    ]
    groups = compared(pairs)
    limit = min(config.max_length, scorer.config.max_position_embeddings)
    kept = fitting(groups, [group.longest for group in groups], limit, str(preferences))
    order = Epochs(len(kept), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Answers]:
        chosen = [kept[i] for i in order.batch(step)]
        cuts = cut_to_budget([group.size for group in chosen], config.micro_tokens)
        return [Answers.of(chosen[cut], scorer.device) for cut in cuts]

    metrics = Trainer(
        label=label,
        model=scorer,
        batch=batch,
        loss=lambda answers: answers.loss(scorer),
        tokens=lambda answers: len(answers.rows.tokens),
        steps=order.steps,
        optimizer=config.train,
        save=config.save,
        scratch=scratch,
        output=output,
        generators=generators,
    ).run()
    save_checkpoint(scorer, tokenizer, output)
    used = {"pairs": sum(len(group.pairs) for group in kept), "prompts": len(kept)}
    return metrics | used | {"too_long": len(groups) - len(kept)}
