"""Low-rank adapters: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), in PEFT's file format.

A frozen matrix W gets a learned update s·B·A of low rank, s = alpha / rank. DoRA learns the length
m of each row separately: W' = m · (W + s·B·A) / ‖W + s·B·A‖, row by row, with the norm as a
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

from openqwen.model.quantize import QuantizedLinear, check, refuse_quantized
from openqwen.support.errors import OpenQwenError, disk_errors, suggestion
from openqwen.support.files import read_json, refuse_pointer, write_json
from openqwen.support.settings import Quantization, Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."  # of PEFT's tensor names: its wrapper around the network
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
# These initialisations change W, so the file's A and B do not fit the base model's W.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_CONVERSION = "path_initial_model_for_weight_conversion"  # PEFT then converts A and B to that W


class LoraConfig(Settings):
    """The shape of an adapter."""

    rank: int = Field(16, ge=0, description="rank of the update of each matrix; 0: no adapters")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(
        _TARGETS, min_length=1, description="names of the linear layers that get an adapter"
    )
    dora: bool = Field(
        False, description="DoRA: learn the length of each row separately from its direction"
    )
    base: Literal["none", "int8", "int4"] = Field(
        "none",
        description=(
            "quantise the frozen matrices under adapters to 8 or 4 bits (CPU); none: keep them as "
            "loaded"
        ),
    )


class LoraLinear(nn.Module):
    """A frozen linear layer with an update, which is zero at the start: A is random, B is zero."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        base.requires_grad_(False)
        self.base = base if config.base == "none" else _packed(base, config.base)
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
        """The updated matrix W', [out, in], computed at each access, differentiable."""
        matrix_OI = self._direction()
        if self.magnitude is None:
            return matrix_OI
        return matrix_OI * (self.magnitude / matrix_OI.detach().norm(dim=1))[:, None]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen layer."""
        return self.base.bias

    def _direction(self) -> Tensor:
        """W + s·B·A, [out, in]."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer with the update added to its matrix; the base must not be packed."""
        assert isinstance(self.base, nn.Linear)
        self.base.weight.copy_(self.weight)
        return self.base.requires_grad_(True)


def _packed(linear: nn.Linear, kind: Quantization) -> QuantizedLinear:
    check(kind, linear.weight.device)
    biases = [] if linear.bias is None else [linear.bias.detach()]
    matrix = QuantizedLinear(linear.in_features, {"": linear.out_features}, kind, bool(biases))
    matrix.fill([linear.weight.detach()], biases)
    return matrix


def add_adapters(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the network and add an adapter to each layer in `config.targets`, in place."""
    linears = _linears(refuse_quantized(model).requires_grad_(False))
    names = {name.rpartition(".")[2] for name in linears}
    for target in config.targets:
        if target not in names:
            near = suggestion(target, names)
            what = f"The network has no linear layer called '{target}'.{near}"
            raise OpenQwenError(what, where="lora.targets")
    for name, module in linears.items():
        if name.rpartition(".")[2] in config.targets:
            _replace(model, name, LoraLinear(module, config, generator))


def merge_adapters(model: nn.Module) -> None:
    """Add every update to its matrix and remove the adapters, in place; all is trainable again."""
    for name, module in list(_adapters(model)):
        _replace(model, name, module.merged())
    model.requires_grad_(True)


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM load.

    Layers whose rank or alpha differs from `config` are listed in PEFT's patterns. base: path or id
    of the model under the adapter.
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
    """The update of one linear layer.

    Args:
        a: A, [rank, in].
        b: B, [out, rank].
        scale: s.
        magnitude: DoRA's lengths of the rows, [out].
        base: the matrix W, [out, in], if the file has it; PEFT writes it for the head.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    base: Tensor | None

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.a)


def read_adapter(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerUpdate]:
    """The updates in a PEFT folder, by the names of the linear layers.

    The names of the tensors say which layers have an update. `target_modules` and similar settings
    have many forms; PEFT has already applied them when it writes the tensors.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        shapes: outputs and inputs of each linear layer of the network.

    Raises:
        OpenQwenError: the adapter is of an unsupported kind, or was made for another network.
    """
    values, tensors = _read_config(folder / CONFIG), _read_tensors(folder)
    updates: dict[str, LayerUpdate] = {}
    layers = [name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name]
    for layer in dict.fromkeys(layers):
        if layer not in shapes:
            what = f"This network has no linear layer '{layer}', but the adapter updates it."
            do = "use the network that it was trained for"
            if layer == "lm_head":
                do = "merge it in PEFT (merge_and_unload), or train it without lm_head"
            raise OpenQwenError(what, where=folder, do=do)
        outputs, inputs = shapes[layer]
        rank, scale = _rank_and_scale(values, layer, folder / CONFIG)
        wanted = {
            f"{layer}.lora_A.weight": [rank, inputs],
            f"{layer}.lora_B.weight": [outputs, rank],
            f"{layer}.lora_magnitude_vector": [outputs] if values.get("use_dora") else None,
            f"{layer}.base_layer.weight": [outputs, inputs],
        }
        stored = [tensors.pop(name, None) for name in wanted]
        for (name, need), tensor in zip(wanted.items(), stored):
            shape = None if tensor is None else list(tensor.shape)
            if need != shape and (shape or not name.endswith("base_layer.weight")):
                held, needed = shape or "nothing", need or "nothing"
                what = f"The adapter holds {held} for '{name}'; this network needs {needed}."
                raise OpenQwenError(what, where=folder)
        a, b, magnitude, base = stored
        assert a is not None
        assert b is not None
        updates[layer] = LayerUpdate(a, b, scale, magnitude, base)
    if tensors or not updates:
        what = "The adapter has no update of a layer."
        if tensors:
            what = f"The adapter has '{next(iter(tensors))}', which is not supported."
        do = "merge it in PEFT (merge_and_unload)"
        raise OpenQwenError(what, where=folder / WEIGHTS, do=do)
    return updates


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Add the adapter in a PEFT folder to the network, in place.

    Returns the configuration that `save_adapter` needs to write it again. Raises OpenQwenError
    where the adapter is not supported or does not fit, or the network is quantised.
    """
    linears = _linears(refuse_quantized(model))
    updates = read_adapter(folder, {name: linear.weight.shape for name, linear in linears.items()})
    model.requires_grad_(False)
    for name, update in updates.items():
        dora = update.magnitude is not None
        config = LoraConfig(rank=update.rank, alpha=update.scale * update.rank, dora=dora)
        layer = LoraLinear(linears[name], config, torch.Generator())
        _replace(model, name, layer)
        with torch.no_grad():
            layer.lora_A.copy_(update.a)
            layer.lora_B.copy_(update.b)
            if layer.magnitude is not None and update.magnitude is not None:
                layer.magnitude.copy_(update.magnitude)
            if update.base is not None:
                linears[name].weight.copy_(update.base)
    # With the last layer's rank and alpha; saving lists other layers' in patterns if they differ.
    return config.model_copy(update={"targets": list(updates)})


def _rank_and_scale(values: Mapping[str, Any], layer: str, where: Path) -> tuple[int, float]:
    """Rank and scale s of one layer, by the first pattern that matches the end of its name."""
    numbers = []
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = 8 if values.get(key) is None else values[key]
        for name, special in (values.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({name})$", layer):
                value = special
                break
        if not isinstance(value, int | float) or value <= 0:
            what = f"'{key}' of '{layer}' is {value!r}, not a number above 0."
            raise OpenQwenError(what, where=where)
        numbers.append(value)
    rank, alpha = int(numbers[0]), numbers[1]
    return rank, alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _read_config(path: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter; OpenQwenError where its kind is not supported."""
    values = read_json(path)
    if not isinstance(values, dict):
        what = "This file is not an adapter's configuration."
        raise OpenQwenError(what, where=path, do="give a folder that PEFT saved")
    start = values.get("init_lora_weights")
    if str(start).lower().startswith(_CHANGED_BASE):
        reason = f"init_lora_weights: {start} changed them at the start"
        what = f"The weights under this adapter are not its base model's ({reason})."
        merged = "merged (merge_and_unload)"
        do = f"save it from the PEFT model that was trained: {merged}, or with {_CONVERSION}"
        raise OpenQwenError(what, where=path, do=do)
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            list(map(re.compile, dict(values.get(key) or {})))
        except (re.error, TypeError, ValueError) as error:
            what = f"'{key}' does not map regular expressions to numbers: {error}."
            raise OpenQwenError(what, where=path) from None
    unlike = [key for key in _UNLIKE if values.get(key)]
    for key, kinds in _KINDS.items():
        if values.get(key) not in kinds:
            unlike.append(f"{key} {values.get(key)}")
    if unlike:
        what = f"This adapter is of a kind that is not supported: {', '.join(unlike)}."
        do = "merge it in PEFT (merge_and_unload), and load the merged model"
        raise OpenQwenError(what, where=path, do=do)
    return values


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's names, without the prefix."""
    try:
        refuse_pointer(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        if (folder / "adapter_model.bin").is_file():
            what = "they are a pickle (adapter_model.bin), which can run any code"
            do = "save it again with PEFT, as safetensors"
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
    """Yield the adapters' parameters with PEFT's names, without the prefix."""
    for name, module in _adapters(model):
        yield f"{name}.lora_A.weight", module.lora_A
        yield f"{name}.lora_B.weight", module.lora_B
        if module.magnitude is not None:
            yield f"{name}.lora_magnitude_vector", module.magnitude


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
