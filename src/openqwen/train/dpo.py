"""Direct preference optimisation on preferences P: the offline stage.

Rafailov et al. 2023; Qwen2 report, 4.3. Other losses: IPO, cDPO, length-normalised ones, and KTO,
which reads answers with a label each (`unpaired.py`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save
from torch import Tensor

from openqwen.model import Qwen2
from openqwen.support.batching import cut_to_budget
from openqwen.support.files import whole_file
from openqwen.support.generators import Generators
from openqwen.support.progress import Progress, progress
from openqwen.support.settings import Settings
from openqwen.support.stage import CHAT, MODEL, PREFERENCES, Effort, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train import losses
from openqwen.train.branches import pack_answers
from openqwen.train.compute import Precision, computing
from openqwen.train.losses import Loss, document_log_probs
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
from openqwen.train.unpaired import LabelledAnswers, LabelledRows, OtherAnswers

# Settings without a meaning for answers that are not compared.
_OF_PAIRS = ("label_smoothing", "length_normalized", "first_difference", "hottest", "chosen_nll")


class DpoLossConfig(Settings):
    """The settings that offline and online DPO share."""

    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO's own loss, or IPO's")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="sigmoid: share of pairs that are the wrong way round (cDPO)"
    )
    length_normalized: bool = Field(
        False, description="compare mean log-probabilities of tokens in place of their sums"
    )
    first_difference: bool = Field(
        False, description="cut answers behind the first token at which they differ (Step-DPO)"
    )
    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference model")

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Self:
        refused = {"ipo": ("label_smoothing",), "kto": _OF_PAIRS}.get(self.loss, ())
        for name in refused:
            if getattr(self, name):
                raise ValueError(f"the loss {self.loss} has no {name}")
        return self


class DpoConfig(DpoLossConfig, PreferencesConfig):
    """One epoch at 7e-7 as Qwen2.5's offline stage; β 0.1 is the Online Merging paper's."""

    loss: Literal["sigmoid", "ipo", "kto"] = Field(  # type: ignore[assignment]
        "sigmoid",
        description="DPO's own loss, IPO's, or KTO's. kto reads records of one answer with `label`"
        " true or false (prompt and completion, messages, and the other forms of demonstrations);"
        " a pair counts as a good and a bad answer",
    )
    desirable: float = Field(1.0, ge=0, description="kto: weight of good answers")
    undesirable: float = Field(1.0, ge=0, description="kto: weight of bad answers")
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
        self, model: Qwen2, config: DpoLossConfig, chosen_nll: float = 0.0, world: World = ALONE
    ) -> Loss:
        """The loss of the pairs, plus `chosen_nll` times the mean token NLL of chosen answers."""
        policy = document_log_probs(model, self.rows, world)
        lengths = torch.tensor(self.rows.counts, device=policy.device)
        given = policy[self.pairs], self.reference[self.pairs], config.beta
        divisor = lengths[self.pairs] if config.length_normalized else None
        if config.loss == "ipo":
            loss = losses.ipo(*given, divisor)
        else:
            loss = losses.dpo(*given, config.label_smoothing, divisor)
        if chosen_nll:
            loss.sum = loss.sum - chosen_nll * (policy / lengths)[self.pairs[:, 0]].sum()
        return loss


Groups = Preferences | LabelledAnswers | Sequence[PreferenceGroup]


@torch.no_grad()
def answer_log_probs(
    model: Qwen2,
    groups: Groups,
    micro_tokens: int,
    precision: Precision = "auto",
    world: World = ALONE,
    bar: Progress | None = None,
) -> Tensor:
    """Log-probabilities of all answers, [answers], on the CPU. Each rank computes its share.

    bar: advanced by the prompts.
    """
    ends = [0, *accumulate(len(group.answers) for group in groups)]
    values = torch.zeros(ends[-1])
    cuts = list(cut_to_budget([group.size for group in groups], micro_tokens))
    for cut, counts in world.local_micro_batches(cuts):
        part = [groups[index] for index in range(cut.start, cut.stop)]
        rows = pack_answers([(group.prompt, group.answers) for group in part], model.device)
        with computing(precision, model.device):
            log_probs = document_log_probs(model, rows, world).cpu()
        values[ends[cut.start] : ends[cut.stop]] += log_probs * counts
        if bar:
            bar.advance((cut.stop - cut.start) * counts)
    if world.alone:
        return values
    return torch.tensor(world.total(values.tolist()), dtype=torch.float32)


def reference_log_probs(
    model: Qwen2,
    groups: Groups,
    micro_tokens: int,
    label: str,
    precision: Precision = "auto",
    world: World = ALONE,
) -> Tensor:
    """The same with a progress line.

    precision: must be the one that the policy trains in, so that both round alike.
    """
    with progress(label, len(groups), "prompts") as bar:
        return answer_log_probs(model, groups, micro_tokens, precision, world, bar)


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
    work = _unpaired if config.loss == "kto" else _paired
    trainer, counts = work(config, model, preferences, tokenizer, place, generators, world)
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    return metrics | counts


_Work = tuple[Trainer, dict[str, float]]  # a trainer that is ready to run, and counts of its data


def _paired(
    config: DpoConfig,
    model: Qwen2,
    preferences: Path,
    tokenizer: Tokenizer,
    place: Place,
    generators: Generators,
    world: World,
) -> _Work:
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

    loss = lambda pairs: pairs.loss(model, config, config.chosen_nll, world)  # noqa: E731
    trainer = Trainer(place, config, model, batch, loss, order.steps, generators, world=world)
    trainer.shard()
    reference = _cached_reference("reference", model, data, config, place, world)
    return trainer, data.counts


def _unpaired(
    config: DpoConfig,
    model: Qwen2,
    preferences: Path,
    tokenizer: Tokenizer,
    place: Place,
    generators: Generators,
    world: World,
) -> _Work:
    """KTO. The divergence of a step is that of all its micro-batches, before the step."""
    limit = min(config.max_length, model.config.max_position_embeddings)
    data = LabelledAnswers.read(preferences, tokenizer, limit, place)
    order = Epochs(len(data), config.epochs, config.batch, generators)
    others = OtherAnswers(data, [i for step in range(order.steps) for i in order.batch(step)])
    weights = config.desirable, config.undesirable

    def batch(step: int) -> list[LabelledRows]:
        chosen, start = order.batch(step), step * config.batch
        part = slice(start, start + len(chosen))
        precision = config.train.precision
        policy = answer_log_probs(model, others[part], config.micro_tokens, precision, world)
        divergence = max(0.0, float((policy - other_reference[part]).mean()))
        return [
            LabelledRows.of(data, chosen[cut], reference, divergence, model.device)
            for cut in cut_to_budget(data.sizes[chosen].tolist(), config.micro_tokens)
        ]

    loss = lambda rows: rows.loss(model, config.beta, weights, world)  # noqa: E731
    trainer = Trainer(place, config, model, batch, loss, order.steps, generators, world=world)
    trainer.shard()
    reference = _cached_reference("reference", model, data, config, place, world)
    other_reference = _cached_reference("others", model, others, config, place, world)
    return trainer, data.counts


def _cached_reference(
    name: str,
    model: Qwen2,
    data: Groups,
    config: DpoConfig,
    place: Place,
    world: World,
) -> Tensor:
    """The reference's log-probabilities of all answers, computed now where the scratch has none."""
    path = place.scratch / f"{name}.safetensors"
    if not world.broadcast(path.exists()):
        place.scratch.mkdir(parents=True, exist_ok=True)
        label, precision = f"{place.label} {name}", config.train.precision
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
