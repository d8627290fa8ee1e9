"""`openqwen merge BASE MODELS...`: one checkpoint from several that were fine-tuned from one base.

    linear            Σ w θ / Σ w, over the base and the models (Wortsman et al. 2022)
    slerp             on the arc from the base to one model, t of the way (Shoemake 1985)
    task-arithmetic   θ_b + λ Σ w τ, with τ = θ − θ_b (Ilharco et al. 2023)
    ties              the same with the largest entries of each τ, of which only those of the sign
                      that has more weight are averaged (Yadav et al. 2023)
    dare              task arithmetic with a random share of each τ, divided by the share (Yu et al.
                      2024)

A tensor is merged at a time, in float32, and files are written one by one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openqwen.model import load_model, save_checkpoint
from openqwen.model.quantize import refuse_quantized
from openqwen.model.stored import PLAIN, Reader, Stored
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import CHAT, Stage, StageRun
from openqwen.tokenizer import load_tokenizer
from openqwen.train.merging.masks import LocalElements, random_mask, stream
from openqwen.train.merging.select import top_mask
from openqwen.train.merging.settings import check_shapes, check_vocabulary

_COLLINEAR = 0.9995  # SLERP is linear where the cosine is larger, as usual
_SHARD_BYTES = 2**30  # a file is in memory while it is merged


class MergeConfig(Settings):
    """How several models become one. The first model's tokenizer and settings are kept."""

    method: Literal["linear", "slerp", "ties", "dare", "task-arithmetic"] = Field(
        "ties", description="how tensors are merged"
    )
    models: list[Path] = Field(
        default_factory=list, description="the models to merge with the base, one or more"
    )
    weights: list[float] = Field(
        default_factory=list,
        description="a weight for each model (linear: for the base first); none: 1 each",
    )
    t: float = Field(0.5, ge=0, le=1, description="slerp: 0 is the base, 1 the model")
    density: float = Field(
        0.2, gt=0, le=1, description="ties, dare: share of a task vector's entries to keep"
    )
    scale: float = Field(1.0, description="factor λ of the merged task vector")
    normalize: bool = Field(
        True, description="linear, ties: divide by the sum of the weights that take part"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the result; none: the base's"
    )

    @model_validator(mode="after")
    def _has_one_weight_for_each(self) -> Self:
        wanted = len(self.models) + (self.method == "linear")
        if self.method == "slerp" and (self.weights or len(self.models) > 1):
            raise ValueError("slerp goes from the base to one model, by t")
        if self.weights and len(self.weights) != wanted:
            raise ValueError(f"{len(self.weights)} weights are given, and {wanted} are needed")
        if self.weights and self.method == "linear" and self.normalize and not sum(self.weights):
            raise ValueError("the weights add up to 0")
        return self


def run_merge(run: StageRun) -> dict[str, float]:
    """A base and models that were fine-tuned from it → one checkpoint."""
    config: MergeConfig = run.config
    if not config.models:
        do = "openqwen merge --method ties BASE MODEL MODEL --output FOLDER"
        raise OpenQwenError("No model to merge with the base is given.", "models", do)
    sources = [Path(local(path)) for path in (run.inputs["base"], *config.models)]
    networks = [refuse_quantized(load_model(path, None, "meta")) for path in sources]
    for path, network in zip(sources[1:], networks[1:]):
        check_shapes(networks[0], network, path)
        check_vocabulary(sources[0], path)
    places = [network.stored or {} for network in networks]
    # Everything but the weights is the first model's: its chat template, and the tokens at which
    # it stops.
    result = networks[1].to(_dtype(config.dtype, places[0]))
    moved, whole = 0.0, 0.0

    with Reader() as reader, progress("merging", result.config.parameters(), "weights") as bar:

        def merged(name: str) -> Tensor:
            nonlocal moved, whole
            tensors = []
            for stored in places:
                tensors.append(torch.empty(stored[name].shape))
                reader.copy(stored[name], tensors[-1])
            out = merge_tensor(name, tensors, config, run.seed)
            if not torch.isfinite(out).all():
                do = "look for NaN and infinite weights in the models, or lower the weights"
                raise OpenQwenError(f"'{name}' is not finite when it is merged.", name, do)
            moved += float((out - tensors[0]).double().square().sum())
            whole += float(tensors[0].double().square().sum())
            bar.advance(out.numel())
            return out.to(next(result.parameters()).dtype)

        tokenizer = load_tokenizer(sources[1])
        save_checkpoint(result, tokenizer, run.output, _SHARD_BYTES, values=merged)
    distance = (moved / whole) ** 0.5 if whole else 0.0
    return {"distance": distance, "models": len(sources), "parameters": result.config.parameters()}


def merge_tensor(name: str, tensors: Sequence[Tensor], config: MergeConfig, seed: int) -> Tensor:
    """One tensor of the result.

    Args:
        name: of the tensor; it keys DARE's masks.
        tensors: the base's and the models', float32, of one shape.
        config: its weights are for the models, or with `linear` for the base too.
        seed: of DARE's masks.
    """
    base = tensors[0]
    if config.method == "slerp":
        return slerp(base, tensors[1], config.t)
    weights = config.weights or [1.0] * len(tensors)
    if config.method == "linear":
        total = sum(weights) if config.normalize else 1.0
        return torch.stack([w * x for w, x in zip(weights, tensors)]).sum(0) / total
    deltas = []
    for number, (weight, tensor) in enumerate(zip(weights, tensors[1:])):
        tau = (tensor - base).flatten()
        elements = LocalElements(len(tau), run=len(tau))
        if config.method == "ties" and config.density < 1:
            k = max(1, int(config.density * len(tau)))
            tau = torch.where(top_mask(tau, k, elements, _one_rank), tau, 0.0)
        elif config.method == "dare" and config.density < 1:
            key = stream(seed, name, number)
            mask = random_mask(key, config.density, elements, tau.device)
            tau = torch.where(mask, tau / config.density, 0.0)
        deltas.append(weight * tau)
    stacked = torch.stack(deltas)
    merged = stacked.sum(0)
    if config.method == "ties":
        sign = torch.where(merged >= 0, 1.0, -1.0)
        agrees = stacked.sign() == sign
        merged = torch.where(agrees, stacked, 0.0).sum(0)
        if config.normalize:
            shares = torch.tensor(weights[: len(deltas)])[:, None]
            divisor = torch.where(agrees, shares, 0.0).sum(0)
            merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return base + (config.scale * merged).view_as(base)


def slerp(base: Tensor, model: Tensor, t: float) -> Tensor:
    """The point t of the way on the arc between two tensors, as vectors; float32.

    A tensor of zeros, which has no direction, is at a right angle to any other, as in mergekit.
    """
    one, other = base.double().flatten(), model.double().flatten()
    norms = float(one.norm()) * float(other.norm())
    cosine = float(one @ other) / norms if norms else 0.0
    if abs(cosine) > _COLLINEAR:
        return (1 - t) * base + t * model
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    shares = torch.sin((1 - t) * angle), torch.sin(t * angle)
    return (float(shares[0] / angle.sin()) * base) + (float(shares[1] / angle.sin()) * model)


def _one_rank(counts: Tensor) -> Tensor:
    return counts


def _dtype(name: str | None, stored: Mapping[str, Stored]) -> torch.dtype:
    """The named dtype, or that of the files; float32 where they have blocks or several types."""
    if name is not None:
        return getattr(torch, name)
    types = {tensor.type for tensor in stored.values()}
    return PLAIN.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


STAGE = Stage(
    name="merge",
    help="Merge models that were fine-tuned from one base.",
    config=MergeConfig,
    inputs={"base": "The model under the others: a Hugging Face folder, a .gguf file or a hub id."},
    outputs=["model", CHAT],
    run=run_merge,
)
