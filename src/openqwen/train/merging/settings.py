"""`train.merging`: Online Merging in a stage, with a base model from a folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openqwen.model import load_model
from openqwen.model.lora import LoraLinear
from openqwen.model.quantize import refuse_quantized
from openqwen.model.stored import Reader
from openqwen.model.weights import read_block
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import notice
from openqwen.support.settings import Settings
from openqwen.tokenizer import load_tokenizer
from openqwen.train.merging.optimizer import SPARSE, OnlineMerging


class MergingConfig(Settings):
    """The Online Merging Optimizer (see `OnlineMerging`); without a base it is off.

    Each step of AdamW is merged with the task vector: the weights that the stage starts from, minus
    those of the base. The defaults are for OnDARE in the released code's scaling.
    """

    base: Path | None = Field(
        None,
        description="the pre-trained model under the one that training starts from: a folder, or in"
        " a recipe the name of an earlier stage; none: no merging",
    )
    form: Literal["dare", "ties"] = Field(
        "dare",
        description="dare: OnDARE, random masks; ties: OnTIES, the largest entries and signs",
    )
    alpha: float = Field(1e-6, ge=0, le=1, description="weight of the task vector in each step")
    reserve: float = Field(0.01, gt=0, le=1, description="share of each tensor's entries to keep")
    every: int = Field(1, ge=1, description="steps between merges; the others are AdamW's")
    scaling: Literal["inverse", "none"] = Field(
        "inverse",
        description="of dare: inverse divides kept entries by `reserve`, as published numbers need;"
        " none is the paper's equation and needs a learning rate and alpha up to 1/reserve times as"
        " large",
    )
    signs: Literal["weighted", "unweighted"] = Field(
        "weighted",
        description="of ties: weighted compares entries with their weights, as in the paper, so the"
        " step mostly decides; unweighted, as in the released code, so the task vector mostly does",
    )
    store: Literal["float32", "bfloat16", "disk"] = Field(
        "float32",
        description="where the task vector is kept if it is not sparse: with more than a quarter"
        " reserved, or dare without scaling",
    )

    @model_validator(mode="after")
    def _has_base(self) -> Self:
        if self.base is None and any(
            getattr(self, name) != field.default for name, field in type(self).model_fields.items()
        ):
            raise ValueError("merging needs a base: give merging.base, the pre-trained model")
        return self

    @property
    def bytes_per_weight(self) -> float:
        """Memory beside AdamW's moments, for each trained weight."""
        dense = {"float32": 4.0, "bfloat16": 2.0, "disk": 0.0}[self.store]
        fresh = self.form == "dare" and self.scaling == "none"
        sparse = self.reserve <= SPARSE and not fresh
        kept = (2 if self.store == "bfloat16" else 4) * self.reserve + 1 / 8  # values, and bits
        task = kept if sparse else dense
        used = self.alpha > 0 or (self.form, self.signs) == ("ties", "unweighted")
        lost, cached = 4 * (used or self.every > 1), 4 * (self.every > 1)
        return task * used + lost + cached


def online_merging(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    config: MergingConfig,
    seed: int,
    start: Path | None = None,
    scratch: Path | None = None,
    **adamw: Any,
) -> OnlineMerging:
    """The optimizer of a model whose weights are still those that training starts from.

    Args:
        model: Whole, or sharded. Each rank reads its part of the base from the files.
        groups: Parameter groups with (name, parameter) pairs.
        config: With a base.
        seed: Of the masks.
        start: The folder that the weights come from; its tokenizer must be the base's.
        scratch: Where the task vector is put with `store: disk`.
        adamw: lr, betas and eps.

    Raises:
        OpenQwenError: The base is of another architecture or vocabulary, or the model has adapters.
    """
    assert config.base is not None
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise OpenQwenError(
            "Merging needs the task vector of each trained tensor, and a base has no adapters.",
            where="train.merging.base",
            do="train all weights (lora.rank 0), or train adapters without merging and merge the"
            " result with `openqwen merge`",
        )
    if start is not None:
        check_vocabulary(start, config.base)
    named = [pair for group in groups for pair in group["params"]]
    optimizer = OnlineMerging(
        groups,
        (parameter for _, parameter in named),
        _base_tensors(model, config.base, named),
        generator=Generators(seed).torch("merging"),
        store=torch.bfloat16 if config.store == "bfloat16" else torch.float32,
        folder=scratch if config.store == "disk" else None,
        **config.model_dump(exclude={"base", "store"}),
        **adamw,
    )
    if config.alpha and optimizer.has_no_task:
        text = "training starts from the weights of train.merging.base, so nothing is merged"
        notice(text, config.base)
    return optimizer


def check_vocabulary(model: Path, base: Path) -> None:
    """Raise OpenQwenError where two models' tokenizers give other ids to a token."""
    ours, theirs = (load_tokenizer(source) for source in (model, base))
    pairs = zip(ours.vocabulary, theirs.vocabulary)
    first = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    sizes = [len(ours.vocabulary), len(theirs.vocabulary)]
    if first is None and sizes[0] == sizes[1]:
        return
    what = f"{sizes[0]:,} tokens in one and {sizes[1]:,} in the other"
    if first is not None:
        tokens = ours.vocabulary[first], theirs.vocabulary[first]
        what = f"the token {first} is {tokens[0]!r} in one and {tokens[1]!r} in the other"
    raise OpenQwenError(
        f"The vocabulary of {model} is not that of the base: {what}.",
        where=base,
        do="give models with one tokenizer",
    )


def check_shapes(model: nn.Module, base: nn.Module, where: Path) -> None:
    """Raise OpenQwenError with the first tensor that two networks do not have in common."""
    ours, theirs = (
        {name: list(parameter.shape) for name, parameter in network.named_parameters()}
        for network in (model, base)
    )
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise OpenQwenError(
                f"This model has another architecture or vocabulary: '{name}' is "
                f"{theirs.get(name, 'missing')} in it, and {ours.get(name, 'missing')} in the "
                "model that it is merged with.",
                where=where,
                do="give models that were fine-tuned from the same base, and that base",
            )


def _base_tensors(
    model: nn.Module, source: Path, named: Sequence[tuple[str, Tensor]]
) -> Iterator[Tensor]:
    """This rank's part of each tensor of the base in float32, read when it is asked for."""
    base = refuse_quantized(load_model(source, device="meta"))
    check_shapes(model, base, source)
    assert base.stored is not None
    with Reader() as reader:
        for name, like in named:
            shape: Sequence[int] = like.shape
            offset: Sequence[int] = [0] * like.dim()
            if isinstance(like, DTensor):
                mesh, placements = like.device_mesh, like.placements
                shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
            part = torch.empty(tuple(shape))
            if part.numel():
                read_block(reader, base.stored, name, like.shape, offset, part)
            if isinstance(like, DTensor):
                part = DTensor.from_local(
                    part.to(like.device),
                    like.device_mesh,
                    like.placements,
                    run_check=False,
                    shape=like.shape,
                    stride=like.stride(),
                )
            yield part
