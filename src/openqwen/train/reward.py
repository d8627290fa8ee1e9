"""The reward model: a decoder with an output for each criterion, trained on preferences P."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from openqwen.model import Scorer, scorer_from
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.stage import MODEL, PREFERENCES, Effort, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train import losses
from openqwen.train.branches import pack_answers
from openqwen.train.comparisons import OVERALL, ComparedAnswers, Comparisons
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.preferences import PreferencesConfig, preferences_effort
from openqwen.train.trainer import Place, Trainer


class RewardConfig(PreferencesConfig):
    """One epoch at 3e-6 and batches of 64, Qwen's (2023) values; the later reports give none."""

    criteria: dict[str, float] = Field(
        {},
        description="weights of criteria in the reward, such as truthfulness 1 conciseness 0.5:"
        " each gets an output and learns from the preferences that name it; none: one output",
    )
    loss: Literal["pairwise", "listwise"] = Field(
        "pairwise",
        description="what counts once: a pair, or a prompt with all its pairs (Qwen2.5-Math)",
    )
    center: float = Field(
        0.0, ge=0, description="weight of (r⁺ + r⁻)² in the loss, which keeps scores around zero"
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-6), description="optimizer"
    )


@dataclass
class ScoredAnswers:
    """A micro-batch of answers behind their prompts, each scored at its last token, and compared.

    last: the rows of those tokens, [answers]. pairs: the better and the worse answer of each
    comparison, [P, 2]. criteria: its criterion, [P], −1 for the reward. margins: [P]. lists: the
    prompt and criterion that it belongs to, numbered from 0, [P].
    """

    rows: PackedBatch
    last: Tensor
    pairs: Tensor
    criteria: Tensor
    margins: Tensor
    lists: Tensor

    @classmethod
    def of(cls, groups: Sequence[ComparedAnswers], device: torch.device) -> "ScoredAnswers":
        """Pack groups."""
        # The last token of a document predicts nothing and is not fed. Here the answer's last token
        # must be fed, so another token, no matter which, stands behind it.
        fed = [
            (group.prompt, [[*answer, answer[-1]] for answer in group.answers]) for group in groups
        ]
        rows = pack_answers(fed, device)
        ends = torch.tensor(rows.counts, device=device).cumsum(0) - 1
        starts = accumulate((len(group.answers) for group in groups), initial=0)
        pairs, criteria, margins, lists = [], [], [], []
        numbers: dict[tuple[int, int], int] = {}
        for start, group in zip(starts, groups):
            for compared in group.comparisons:
                pairs.append((start + compared.chosen, start + compared.rejected))
                criteria.append(compared.criterion)
                margins.append(compared.margin)
                lists.append(numbers.setdefault((start, compared.criterion), len(numbers)))
        columns = (torch.tensor(x, device=device) for x in (pairs, criteria, margins, lists))
        return cls(rows, rows.learned[ends], *columns)

    def loss(self, scorer: Scorer, listwise: bool = False, center: float = 0.0) -> losses.Loss:
        """See `losses.reward`. listwise: the comparisons of a prompt count once together."""
        scores_AC = scorer(self.rows.tokens, self.rows.positions, self.rows.attention, self.last)
        weights_C = scorer.weights_C.to(scores_AC.device)
        # One output for a criterion, the weighted sum of all for the reward.
        outputs_XC = torch.cat([torch.eye(len(weights_C)).to(weights_C), weights_C[None]])
        compared_P2 = (scores_AC[self.pairs] * outputs_XC[self.criteria][:, None]).sum(-1)
        better_P, worse_P = compared_P2.unbind(1)
        lists_P = self.lists if listwise else None
        return losses.reward(better_P, worse_P, self.margins, lists_P, center)


def reward(
    config: RewardConfig, start: Path, preferences: Path, tokenizer: Tokenizer, place: Place
) -> dict[str, float]:
    """Train a reward model, from the language model at `start`, on preferences."""
    if OVERALL in config.criteria:
        do = f"name the criteria alone; '{OVERALL}' in a record is their weighted sum"
        raise OpenQwenError(f"'{OVERALL}' is no criterion.", "reward.criteria", do)
    generators = Generators(place.seed)
    scorer = scorer_from(start, generators.torch("weights"), config.criteria).to(best_device())
    window = scorer.config.max_position_embeddings
    data = Comparisons.of(preferences, tokenizer, config, config.criteria, window, place)
    order = Epochs(len(data), config.epochs, config.batch, generators)

    def batch(step: int) -> list[ScoredAnswers]:
        cuts = data.cut(order.batch(step), config.micro_tokens)
        return [ScoredAnswers.of([data[i] for i in cut], scorer.device) for cut in cuts]

    def loss(answers: ScoredAnswers) -> losses.Loss:
        return answers.loss(scorer, config.loss == "listwise", config.center)

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
