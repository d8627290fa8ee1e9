"""The reward model: a decoder with one linear output, trained on preferences P."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from openqwen.model import Packed, Scorer, scorer_from
from openqwen.support.batching import cut_to_budget
from openqwen.support.device import best_device
from openqwen.support.generators import Generators
from openqwen.support.stage import MODEL, PREFERENCES, Effort, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.branches import pack_answers
from openqwen.train.conversations import Messages, encode_answer
from openqwen.train.losses import Loss, bradley_terry
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.preferences import (
    PreferenceGroup,
    Preferences,
    PreferencesConfig,
    pair_indices,
    preferences_effort,
)
from openqwen.train.trainer import Place, Trainer


class RewardConfig(PreferencesConfig):
    """One epoch at 3e-6 and batches of 64, Qwen's (2023) values; the later reports give none."""

    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-6), description="optimizer"
    )


@dataclass
class ScoredAnswers:
    """A micro-batch of answers behind their prompts, each scored at its last token, and compared.

    last: the rows of those tokens, [answers]. pairs: indices of the chosen and the rejected answer,
    [pairs, 2].
    """

    rows: PackedBatch
    last: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, groups: Sequence[PreferenceGroup], device: torch.device) -> "ScoredAnswers":
        """Pack groups."""
        # The last token of a document predicts nothing and is not fed. Here the answer's last token
        # must be fed, so another token, no matter which, stands behind it.
        fed = [
            (group.prompt, [[*answer, answer[-1]] for answer in group.answers]) for group in groups
        ]
        rows = pack_answers(fed, device)
        ends = torch.tensor(rows.counts, device=device).cumsum(0) - 1
        return cls(rows, rows.learned[ends], pair_indices(groups).to(device))

    def loss(self, scorer: Scorer) -> Loss:
        """The pairwise logistic loss (Bradley and Terry)."""
        scores = scorer(self.rows.tokens, self.rows.positions, self.rows.attention, self.last)
        return bradley_terry(*scores[self.pairs].unbind(1))


@torch.inference_mode()
def score_sequences(
    scorer: Scorer, sequences: Sequence[Sequence[int]], micro_tokens: int = 8_192
) -> list[float]:
    """The reward of each token sequence, which ends where its answer ends."""
    scores: list[float] = []
    for part in cut_to_budget([len(s) for s in sequences], micro_tokens):
        ids = [torch.tensor(s) for s in sequences[part]]
        packed = Packed.from_lengths([len(s) for s in ids]).to(scorer.device)
        last = torch.tensor([len(s) for s in ids], device=scorer.device).cumsum(0) - 1
        tokens, positions = torch.cat(ids).to(scorer.device), packed.positions.to(scorer.device)
        scores += scorer(tokens, positions, packed, last).tolist()
    return scores


def score(scorer: Scorer, tokenizer: Tokenizer, conversations: Sequence[Messages]) -> list[float]:
    """The reward of each conversation, which ends with an assistant's answer."""
    ids = [list(encode_answer(tokenizer, c[:-1], c[-1])[0]) for c in conversations]
    return score_sequences(scorer, ids)


def reward(
    config: RewardConfig, start: Path, preferences: Path, tokenizer: Tokenizer, place: Place
) -> dict[str, float]:
    """Train a reward model, from the language model at `start`, on preferences."""
    generators = Generators(place.seed)
    scorer = scorer_from(start, generators.torch("weights")).to(best_device())
    window = scorer.config.max_position_embeddings
    data = Preferences.read(preferences, tokenizer, config, window, place)
    order = Epochs(len(data), config.epochs, config.batch, generators)

    def batch(step: int) -> list[ScoredAnswers]:
        cuts = data.cut(order.batch(step), config.micro_tokens)
        return [ScoredAnswers.of([data[i] for i in cut], scorer.device) for cut in cuts]

    loss = lambda answers: answers.loss(scorer)  # noqa: E731
    trainer = Trainer(place, config, scorer, batch, loss, order.steps, generators)
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    return metrics | data.counts


def run_reward(run: StageRun) -> dict[str, float]:
    """A chat model and preferences P → a reward model."""
    start = run.inputs["model"]
    return reward(run.config, start, run.data("preferences"), load_tokenizer(start), Place.of(run))


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    return preferences_effort(recipe, recipe.reward, recipe.reward.epochs)


STAGE = Stage(
    name="reward",
    help="Train a reward model on preference pairs.",
    config=RewardConfig,
    inputs={"model": MODEL, "preferences": PREFERENCES},
    outputs=["reward"],
    run=run_reward,
    trains_on_ranks=True,
    estimate=_effort,
)
