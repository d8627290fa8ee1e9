"""Low-rank adapters: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), in the file format of the
PEFT library.

A frozen matrix W gets a learned update s·B·A of low rank, s = alpha / rank. DoRA learns the length
of each row apart: W' = m · (W + s·B·A) / ‖W + s·B·A‖, rows taken one by one, the norm treated as a
constant in the gradient (section 4.3).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openqwen.model.quantize import Kind, QuantizedLinear, check, refuse_quantized
from openqwen.support.errors import OpenQwenError, disk_errors, suggestion
from openqwen.support.files import read_json, refuse_pointer, write_json
from openqwen.support.settings import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."  # PEFT's wrapper around the network, in the names of its files
# Settings of PEFT that change what an adapter computes, and that are not supported.
_UNLIKE = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
]
_KINDS = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # These leave W as it is.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}
# After these, the file's A and B belong to another W than the base model's.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_CONVERSION = "path_initial_model_for_weight_conversion"  # PEFT's way back to the base model's W


class LoraConfig(Settings):
    """The shape of an adapter."""

    rank: int = Field(16, ge=0, description="rank of the update of each matrix")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(
        _TARGETS, min_length=1, description="names of the linear layers that get an adapter"
    )
    dora: bool = Field(
        False, description="DoRA: learn the length of each row of a matrix apart from its direction"
    )
    base: Literal["none", "int8", "int4"] = Field(
        "none",
        description=(
            "while adapters learn, the matrices under them are held in 8 or 4 bits (CPU); none: as "
            "loaded"
        ),
    )


class LoraLinear(nn.Module):
    """A frozen linear layer and its update.

    At the start the update is zero: A is random, B is zero.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        self.base = (
            base.requires_grad_(False) if config.base == "none" else _packed(base, config.base)
        )
        self.scale = config.alpha / config.rank
        weight = base.weight
        bound = base.in_features**-0.5  # as PEFT: kaiming uniform with a = √5
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, config.rank))
        self.magnitude = nn.Parameter(weight.norm(dim=1)) if config.dora else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in] → [T, out]."""
        update_TO = F.linear(F.linear(x_TD, self.lora_A), self.lora_B) * self.scale
        if self.magnitude is None:
            return self.base(x_TD) + update_TO
        length_O = self._direction().detach().norm(dim=1)
        out_TO = (F.linear(x_TD, self.base.weight) + update_TO) * (self.magnitude / length_O)
        return out_TO if self.bias is None else out_TO + self.bias

    @property
    def weight(self) -> Tensor:
        """The whole matrix W', [out, in], made anew; its gradient reaches the adapter."""
        matrix_OI = self._direction()
        if self.magnitude is None:
            return matrix_OI
        return matrix_OI * (self.magnitude / matrix_OI.detach().norm(dim=1))[:, None]

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's own."""
        return self.base.bias

    def _direction(self) -> Tensor:
        """W + s·B·A, [out, in]."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same; of one whose base is not packed."""
        assert isinstance(self.base, nn.Linear)
        self.base.weight.copy_(self.weight)
        return self.base.requires_grad_(True)


def _packed(linear: nn.Linear, kind: Kind) -> QuantizedLinear:
    check(kind, linear.weight.device)
    matrix = QuantizedLinear(
        linear.in_features, {"": linear.out_features}, kind, bias=linear.bias is not None
    )
    matrix.fill([linear.weight.detach()], [] if linear.bias is None else [linear.bias.detach()])
    return matrix


def add_adapters(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the network and give every linear layer named in `config.targets` an adapter, in
    place.
    """
    refuse_quantized(model).requires_grad_(False)
    found = {name.rpartition(".")[2] for name in _linears(model)}
    for target in config.targets:
        if target not in found:
            near = suggestion(target, found)
            raise OpenQwenError(
                f"The network has no linear layer called '{target}'.{near}", where="lora.targets"
            )
    for name, module in _linears(model).items():
        if name.rpartition(".")[2] in config.targets:
            _replace(model, name, LoraLinear(module, config, generator))


def merge_adapters(model: nn.Module) -> None:
    """Put every adapter into its matrix, in place: a plain network again, all of it trainable."""
    for name, module in list(_adapters(model)):
        _replace(model, name, module.merged())
    model.requires_grad_(True)


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM load.

    base: the model adapted. Layers with a rank or alpha of their own are listed as PEFT's patterns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + n: t.detach().cpu().contiguous() for n, t in _tensors(model)}
    with disk_errors(folder):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ranks = {name: len(layer.lora_A) for name, layer in _adapters(model)}
    alphas = {name: layer.scale * ranks[name] for name, layer in _adapters(model)}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": config.targets,
        "use_dora": config.dora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if not math.isclose(a, config.alpha)},
    }
    write_json(folder / CONFIG, values)


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter does to one linear layer.

    A [rank, in], B [out, rank], s, DoRA's lengths of the rows [out], and the matrix W itself
    [out, in] where the file repeats it, as PEFT's do of the head.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    base: Tensor | None

    @property
    def rank(self) -> int:
        """The rows of A."""
        return len(self.a)


def read_adapter(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerUpdate]:
    """What a PEFT folder changes, by the name of the linear layer.

    The tensors in the file say which layers have an update: whichever way `target_modules` and its
    like were written, PEFT stored one for each layer that they meant.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        shapes: outputs and inputs of each linear layer of the network.

    Raises:
        OpenQwenError: the adapter is of another kind, or made for another network.
    """
    values, tensors = _read_config(folder / CONFIG), _read_tensors(folder)
    updates: dict[str, LayerUpdate] = {}
    layers = [name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name]
    for layer in dict.fromkeys(layers):
        if layer not in shapes:
            raise OpenQwenError(
                f"This network has no linear layer '{layer}' that the adapter could change.",
                where=folder,
                do="merge it in PEFT (merge_and_unload), or train it without lm_head"
                if layer == "lm_head"
                else "use the network that it was trained for",
            )
        outputs, inputs = shapes[layer]
        rank, scale = _rank_and_scale(values, layer, folder / CONFIG)
        wanted = {
            f"{layer}.lora_A.weight": [rank, inputs],
            f"{layer}.lora_B.weight": [outputs, rank],
            f"{layer}.lora_magnitude_vector": [outputs] if values.get("use_dora") else None,
            f"{layer}.base_layer.weight": [outputs, inputs],
        }
        found = [tensors.pop(name, None) for name in wanted]
        for (name, need), tensor in zip(wanted.items(), found):
            held = None if tensor is None else list(tensor.shape)
            if need != held and (held or not name.endswith("base_layer.weight")):
                what = f"The adapter holds {held} for '{name}'; this network needs {need}."
                raise OpenQwenError(what, where=folder)
        a, b, magnitude, base = found
        assert a is not None
        assert b is not None
        updates[layer] = LayerUpdate(a, b, scale, magnitude, base)
    if tensors or not updates:
        what = "no update of a layer"
        if tensors:
            what = f"'{next(iter(tensors))}', which is not supported"
        raise OpenQwenError(
            f"The adapter holds {what}.",
            where=folder / WEIGHTS,
            do="merge it in PEFT (merge_and_unload)",
        )
    return updates


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Give the network the adapter in a PEFT folder, in place.

    Returns what `save_adapter` needs to write it again. OpenQwenError where the adapter is of
    another kind or network, or the network's matrices are packed.
    """
    linears = _linears(refuse_quantized(model))
    updates = read_adapter(folder, {name: linear.weight.shape for name, linear in linears.items()})
    model.requires_grad_(False)
    for name, update in updates.items():
        dora = update.magnitude is not None
        own = LoraConfig(rank=update.rank, alpha=update.scale * update.rank, dora=dora)
        layer = LoraLinear(linears[name], own, torch.Generator())
        _replace(model, name, layer)
        with torch.no_grad():
            layer.lora_A.copy_(update.a)
            layer.lora_B.copy_(update.b)
            if layer.magnitude is not None and update.magnitude is not None:
                layer.magnitude.copy_(update.magnitude)
            if update.base is not None:
                linears[name].weight.copy_(update.base)
    # The last layer's rank and alpha; those of others that differ become patterns.
    return own.model_copy(update={"targets": list(updates)})


def _rank_and_scale(values: Mapping[str, Any], layer: str, where: Path) -> tuple[int, float]:
    """Of one layer. Patterns match the end of its name; the first that does counts."""
    found = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = 8 if values.get(key) is None else values[key]
        for name, special in (values.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({name})$", layer):
                value = special
                break
        if not isinstance(value, int | float) or value <= 0:
            what = f"'{key}' of '{layer}' is {value!r}, not a number above 0."
            raise OpenQwenError(what, where=where)
        found.append(value)
    rank, alpha = int(found[0]), found[1]
    return rank, alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _read_config(path: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter whose kind is supported."""
    values = read_json(path)
    if not isinstance(values, dict):
        what = "This file is no adapter's configuration."
        raise OpenQwenError(what, where=path, do="give a folder that PEFT saved")
    start = values.get("init_lora_weights")
    if str(start).lower().startswith(_CHANGED_BASE):
        merged = "merged (merge_and_unload)"
        raise OpenQwenError(
            f"The weights under this adapter are not its base model's (init_lora_weights: {start}"
            " changed them at the start).",
            where=path,
            do=f"save it from the PEFT model that was trained: {merged}, or with {_CONVERSION}",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            list(map(re.compile, dict(values.get(key) or {})))
        except (re.error, TypeError, ValueError) as error:
            what = f"'{key}' maps no expressions to numbers: {error}."
            raise OpenQwenError(what, where=path) from None
    unlike = [key for key in _UNLIKE if values.get(key)]
    for key, kinds in _KINDS.items():
        if values.get(key) not in kinds:
            unlike.append(f"{key} {values.get(key)}")
    if unlike:
        raise OpenQwenError(
            f"This adapter is of a kind that is not supported: {', '.join(unlike)}.",
            where=path,
            do="merge it in PEFT (merge_and_unload), and load the merged model",
        )
    return values


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Under PEFT's names without the prefix."""
    try:
        refuse_pointer(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        if (folder / "adapter_model.bin").is_file():
            what = "they are a pickle (adapter_model.bin), which can run any code"
            do = "save it anew with PEFT"
        else:
            what, do = str(error), "fetch the file again"
        what = f"The adapter's weights cannot be read: {what}."
        raise OpenQwenError(what, where=folder / WEIGHTS, do=do) from None
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters' parameters under PEFT's names, without its prefix."""
    for name, module in _adapters(model):
        yield f"{name}.lora_A.weight", module.lora_A
        yield f"{name}.lora_B.weight", module.lora_B
        if module.magnitude is not None:
            yield f"{name}.lora_magnitude_vector", module.magnitude


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
