"""Direct preference optimisation on preferences P (Rafailov et al. 2023; Qwen2 report, 4.3, the offline stage)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from openqwen.model import Qwen2, load_model, save_checkpoint
from openqwen.support.device import best_device
from openqwen.support.errors import disk_errors
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import fitting, pair
from openqwen.train.losses import Loss, document_log_probs
from openqwen.train.losses import dpo as dpo_loss
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.rows import Rows, Sample, cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer


class DpoConfig(BaseModel):
    """One epoch at 7e-7 as Qwen2.5's offline stage; β 0.1 is the Online Merging paper's."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(1.0, gt=0, description="passes over the preferences")
    batch: int = Field(64, gt=0, description="pairs of one optimizer step")
    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference model")
    chosen_nll: float = Field(
        0.0, ge=0, description="weight of the chosen answer's mean token NLL beside the DPO loss (Pang et al. 2024)"
    )
    max_length: int = Field(8_192, gt=1, description="pairs with a longer side are left out and counted")
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")
    train: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


@dataclass
class Pairs:
    """Chosen and rejected answers laid end to end, with what the reference model thinks of each, [pairs, 2]."""

    rows: Rows
    reference: Tensor

    def loss(self, model: Qwen2, beta: float, chosen_nll: float = 0.0) -> Loss:
        """The DPO loss of these pairs; `chosen_nll` times the chosen answers' mean token NLL is added to it."""
        policy_B2 = document_log_probs(model, self.rows).view(-1, 2)
        loss = dpo_loss(policy_B2, self.reference, beta)
        if chosen_nll:
            lengths_B = torch.tensor(self.rows.counts[::2], device=policy_B2.device)
            loss.sum = loss.sum - chosen_nll * (policy_B2[:, 0] / lengths_B).sum()
        return loss


def flat(pairs: list[tuple[Sample, Sample]]) -> list[Sample]:
    """Chosen, rejected, chosen, rejected …"""
    return [side for p in pairs for side in p]


def pair_sizes(pairs: list[tuple[Sample, Sample]]) -> list[int]:
    """Tokens of each pair, both sides."""
    return [len(c[0]) + len(r[0]) for c, r in pairs]


@torch.inference_mode()
def reference_log_probs(model: Qwen2, pairs: list[tuple[Sample, Sample]], micro_tokens: int, label: str) -> Tensor:
    """Log-probabilities of each pair's two answers, [pairs, 2], on the CPU."""
    parts = []
    with progress(label, len(pairs), "pairs") as bar:
        for cut in cut_to_budget(pair_sizes(pairs), micro_tokens):
            rows = Rows.of(flat(pairs[cut]), model.device)
            parts.append(document_log_probs(model, rows).view(-1, 2).cpu())
            bar.advance(cut.stop - cut.start)
    return torch.cat(parts).clone()


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
    model = load_model(start, device=best_device())
    pairs = [
        pair(tokenizer, record, f"{preferences}, record {n}") for n, record in enumerate(read_jsonl(preferences), 1)
    ]
    limit = min(config.max_length, model.config.max_position_embeddings)
    kept = fitting(pairs, [max(len(c[0]), len(r[0])) for c, r in pairs], limit, str(preferences))
    reference = _cached_reference(model, kept, config, scratch, label)
    order = Epochs(len(kept), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Pairs]:
        numbers = order.batch(step)
        chosen = [kept[i] for i in numbers]
        kept_reference = reference[numbers].to(model.device)
        cuts = cut_to_budget(pair_sizes(chosen), config.micro_tokens)
        return [Pairs(Rows.of(flat(chosen[c]), model.device), kept_reference[c]) for c in cuts]

    metrics = Trainer(
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
    ).run()
    save_checkpoint(model, tokenizer, output)
    return metrics | {"pairs": len(kept), "too_long": len(pairs) - len(kept)}


def _cached_reference(
    model: Qwen2, pairs: list[tuple[Sample, Sample]], config: DpoConfig, scratch: Path, label: str
) -> Tensor:
    path = scratch / "reference.safetensors"
    if not path.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        values = reference_log_probs(model, pairs, config.micro_tokens, f"{label} reference")
        aside = path.with_suffix(".aside")
        with disk_errors(path):
            save_file({"log_probs": values}, aside)
        aside.rename(path)
    return load_file(path)["log_probs"]
