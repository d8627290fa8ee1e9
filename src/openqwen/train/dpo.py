"""Direct preference optimisation on preferences P: the offline stage.

Rafailov et al. 2023; Qwen2 report, 4.3.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor

from openqwen.model import Qwen2
from openqwen.support.batching import cut_to_budget
from openqwen.support.files import whole_file
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import CHAT, MODEL, PREFERENCES, Effort, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.branches import pack_answers
from openqwen.train.compute import Precision, computing
from openqwen.train.losses import Loss, document_log_probs
from openqwen.train.losses import dpo as dpo_loss
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import ALONE, World, join, load_for_training
from openqwen.train.preferences import (
    PreferenceGroup,
    Preferences,
    PreferencesConfig,
    pair_indices,
    preferences_effort,
)
from openqwen.train.trainer import Place, Trainer


class DpoLossConfig(Settings):
    """The settings that offline and online DPO share."""

    first_difference: bool = Field(
        False, description="cut answers behind the first token at which they differ (Step-DPO)"
    )
    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference model")


class DpoConfig(DpoLossConfig, PreferencesConfig):
    """One epoch at 7e-7 as Qwen2.5's offline stage; β 0.1 is the Online Merging paper's."""

    hottest: float | None = Field(
        None, gt=0, description="pairs with an answer sampled at a higher temperature are left out"
    )
    chosen_nll: float = Field(
        0.0,
        ge=0,
        description="weight of the chosen answer's mean token NLL, added to the loss"
        " (Pang et al. 2024)",
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer"
    )


@dataclass
class Pairs:
    """A micro-batch of answers, and which of them are compared.

    pairs: indices of the chosen and the rejected answer, [pairs, 2]. reference: log-probabilities
    of the answers under the reference model, [answers].
    """

    rows: PackedBatch
    pairs: Tensor
    reference: Tensor

    @classmethod
    def of(
        cls,
        groups: Sequence[PreferenceGroup],
        reference: Tensor,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Pack groups. reference: the log-probabilities of all their answers, in order."""
        rows = pack_answers([(group.prompt, group.answers) for group in groups], device)
        return cls(rows, pair_indices(groups).to(device), reference.to(device))

    def loss(
        self, model: Qwen2, beta: float, chosen_nll: float = 0.0, world: World = ALONE
    ) -> Loss:
        """The DPO loss, plus `chosen_nll` times the mean token NLL of the chosen answers."""
        policy = document_log_probs(model, self.rows, world)
        loss = dpo_loss(policy[self.pairs], self.reference[self.pairs], beta)
        if chosen_nll:
            lengths = torch.tensor(self.rows.counts, device=policy.device)
            loss.sum = loss.sum - chosen_nll * (policy / lengths)[self.pairs[:, 0]].sum()
        return loss


@torch.no_grad()
def reference_log_probs(
    model: Qwen2,
    groups: Preferences | Sequence[PreferenceGroup],
    micro_tokens: int,
    label: str,
    precision: Precision = "auto",
    world: World = ALONE,
) -> Tensor:
    """Log-probabilities of all answers, [answers], on the CPU. Each rank computes its share.

    precision: must be the one that the policy trains in, so that both round alike.
    """
    ends = [0, *accumulate(len(group.answers) for group in groups)]
    values = torch.zeros(ends[-1])
    cuts = list(cut_to_budget([group.size for group in groups], micro_tokens))
    with progress(label, len(groups), "prompts") as bar:
        for cut, counts in world.local_micro_batches(cuts):
            part = [groups[index] for index in range(cut.start, cut.stop)]
            rows = pack_answers([(group.prompt, group.answers) for group in part], model.device)
            with computing(precision, model.device):
                log_probs = document_log_probs(model, rows, world).cpu()
            values[ends[cut.start] : ends[cut.stop]] += log_probs * counts
            bar.advance((cut.stop - cut.start) * counts)
    if world.alone:
        return values
    return torch.tensor(world.total(values.tolist()), dtype=torch.float32)


def dpo(
    config: DpoConfig, start: Path, preferences: Path, tokenizer: Tokenizer, place: Place
) -> dict[str, float]:
    """Train the model at `start`, which is the reference too, on preferences; save to the output.

    The reference's log-probabilities are computed once, before the first step, and kept beside the
    training states.
    """
    generators = Generators(place.seed)
    model = load_for_training(start)
    world = join().with_mesh(config.train.parallel, model)
    window = model.config.max_position_embeddings
    data = Preferences.read(
        preferences, tokenizer, config, window, place, config.hottest, config.first_difference
    )
    ends = data.answers.cumsum()
    order = Epochs(len(data), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Pairs]:
        micro_batches = []
        for cut in data.cut(order.batch(step), config.micro_tokens):
            values = [reference[ends[i] - data.answers[i] : ends[i]] for i in cut]
            groups = [data[i] for i in cut]
            micro_batches.append(Pairs.of(groups, torch.cat(values), model.device))
        return micro_batches

    loss = lambda pairs: pairs.loss(model, config.beta, config.chosen_nll, world)  # noqa: E731
    trainer = Trainer(place, config, model, batch, loss, order.steps, generators, world=world)
    trainer.shard()
    reference = _cached_reference(model, data, config, place, world)
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    return metrics | data.counts


def _cached_reference(
    model: Qwen2, data: Preferences, config: DpoConfig, place: Place, world: World
) -> Tensor:
    """The reference's log-probabilities of all answers, computed now where the scratch has none."""
    path = place.scratch / "reference.safetensors"
    if not world.broadcast(path.exists()):
        place.scratch.mkdir(parents=True, exist_ok=True)
        label, precision = f"{place.label} reference", config.train.precision
        values = reference_log_probs(model, data, config.micro_tokens, label, precision, world)
        if world.main:
            with whole_file(path, "wb") as file:
                file.write(save({"log_probs": values}))
        world.barrier()
    return load_file(path)["log_probs"]


def run_dpo(run: StageRun) -> dict[str, float]:
    """A chat model and preferences P → an aligned one."""
    start = run.inputs["model"]
    return dpo(run.config, start, run.data("preferences"), load_tokenizer(start), Place.of(run))


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    # The reference reads the pairs once, forward only: a third of a training step.
    return preferences_effort(recipe, recipe.dpo, recipe.dpo.epochs + 1 / 3)


STAGE = Stage(
    name="dpo",
    help="Direct preference optimization on preference pairs.",
    config=DpoConfig,
    inputs={"model": MODEL, "preferences": PREFERENCES},
    outputs=["model", CHAT],
    run=run_dpo,
    trains_on_ranks=True,
    estimate=_effort,
)
