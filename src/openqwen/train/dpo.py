"""Direct preference optimisation on preferences P (Rafailov et al. 2023; Qwen2 report, 4.3, the offline stage)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from openqwen.model import Qwen2
from openqwen.support.errors import disk_errors
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tokenizer import Tokenizer
from openqwen.train.branches import branches
from openqwen.train.conversations import Compared, compared, fitting, pair, pair_numbers
from openqwen.train.losses import Loss, document_log_probs
from openqwen.train.losses import dpo as dpo_loss
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.parallel import join, load_for_training, world_of
from openqwen.train.rows import Rows, cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer


class DpoConfig(BaseModel):
    """One epoch at 7e-7 as Qwen2.5's offline stage; β 0.1 is the Online Merging paper's."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(64, gt=0, description="prompts of one optimizer step, each with all its pairs")
    first_difference: bool = Field(
        False, description="compare answers only as far as the first token at which they differ (Step-DPO)"
    )
    hottest: float | None = Field(
        None, gt=0, description="pairs whose wrong answer was sampled at a higher temperature are left out"
    )
    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference model")
    chosen_nll: float = Field(
        0.0, ge=0, description="weight of the chosen answer's mean token NLL beside the DPO loss (Pang et al. 2024)"
    )
    max_length: int = Field(8_192, gt=1, description="prompts with a longer answer are left out and counted")
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")
    train: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


@dataclass
class Pairs:
    """Answers laid end to end behind their prompts, which of them are compared, and what the reference thinks of each.

    pairs: numbers of the chosen and the rejected answer [pairs, 2]. reference: log-probabilities [answers].
    """

    rows: Rows
    pairs: Tensor
    reference: Tensor

    @classmethod
    def of(cls, groups: Sequence[Compared], reference: Tensor, device: torch.device | str = "cpu") -> "Pairs":
        """Lay out groups; `reference` holds the log-probabilities of all their answers."""
        rows = branches([(group.prompt, group.answers) for group in groups], device)
        return cls(rows, pair_numbers(groups).to(device), reference.to(device))

    def loss(self, model: Qwen2, beta: float, chosen_nll: float = 0.0) -> Loss:
        """The DPO loss of these pairs; `chosen_nll` times the chosen answers' mean token NLL is added to it."""
        policy = document_log_probs(model, self.rows)
        loss = dpo_loss(policy[self.pairs], self.reference[self.pairs], beta)
        if chosen_nll:
            lengths = torch.tensor(self.rows.counts, device=policy.device)
            loss.sum = loss.sum - chosen_nll * (policy / lengths)[self.pairs[:, 0]].sum()
        return loss


@torch.no_grad()
def reference_log_probs(model: Qwen2, groups: Sequence[Compared], micro_tokens: int, label: str) -> Tensor:
    """Log-probabilities of all answers, [answers], on the CPU; each rank reads its share."""
    ends = [0, *accumulate(len(group.answers) for group in groups)]
    found = torch.zeros(ends[-1])
    world = world_of(model)
    with progress(label, len(groups), "prompts") as bar:
        for cut, counts in world.share(list(cut_to_budget([group.size for group in groups], micro_tokens))):
            rows = branches([(group.prompt, group.answers) for group in groups[cut]], model.device)
            values = document_log_probs(model, rows).cpu()
            found[ends[cut.start] : ends[cut.stop]] += values * counts
            bar.advance((cut.stop - cut.start) * counts)
    return found if world.alone else torch.tensor(world.total(found.tolist()), dtype=torch.float32)


def dpo(
    config: DpoConfig,
    start: Path,
    preferences: Path,
    tokenizer: Tokenizer,
    output: Path,
    scratch: Path,
    seed: int,
    label: str,
) -> dict[str, float]:
    """Optimise the model at `start`, which is the reference too, on a JSONL file of preferences; save to `output`.

    The reference's log-probabilities are computed once, before the first step, and kept beside the training states.
    """
    generators = Generators(seed)
    model = load_for_training(start)
    groups = compared(
        pair(tokenizer, record, f"{preferences}, record {n}")
        for n, record in enumerate(read_jsonl(preferences), 1)
        if config.hottest is None or record.get("origin", {}).get("temperature", 0.0) <= config.hottest
    )
    limit = min(config.max_length, model.config.max_position_embeddings)
    kept = fitting(groups, [group.longest for group in groups], limit, str(preferences))
    if config.first_difference:
        kept = [group.to_first_difference() for group in kept]
    order = Epochs(len(kept), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Pairs]:
        numbers = order.batch(step)
        cuts = cut_to_budget([kept[i].size for i in numbers], config.micro_tokens)
        parts = [numbers[cut] for cut in cuts]
        return [Pairs.of([kept[i] for i in p], torch.cat([reference[i] for i in p]), model.device) for p in parts]

    trainer = Trainer(
        label=label,
        model=model,
        batch=batch,
        loss=lambda pairs: pairs.loss(model, config.beta, config.chosen_nll),
        tokens=lambda pairs: len(pairs.rows.tokens),
        steps=order.steps,
        optimizer=config.train,
        save=config.save,
        scratch=scratch,
        output=output,
        generators=generators,
    )
    trainer.shard()
    reference = _cached_reference(model, kept, config, scratch, label).split([len(group.answers) for group in kept])
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    used = {"pairs": sum(len(group.pairs) for group in kept), "prompts": len(kept)}
    return metrics | used | {"too_long": len(groups) - len(kept)}


def _cached_reference(model: Qwen2, groups: Sequence[Compared], config: DpoConfig, scratch: Path, label: str) -> Tensor:
    path, world = scratch / "reference.safetensors", join()
    if not world.agree(path.exists()):
        scratch.mkdir(parents=True, exist_ok=True)
        values = reference_log_probs(model, groups, config.micro_tokens, f"{label} reference")
        if world.main:
            aside = path.with_suffix(".aside")
            with disk_errors(path):
                save_file({"log_probs": values}, aside)
            aside.rename(path)
        world.wait()
    return load_file(path)["log_probs"]
