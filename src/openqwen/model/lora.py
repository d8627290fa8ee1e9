"""Low-rank adapters: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), in the file format of the PEFT library.

A frozen matrix W gets a learned update s·B·A of low rank, s = alpha / rank. DoRA learns the length of each row apart:
W' = m · (W + s·B·A) / ‖W + s·B·A‖, rows taken one by one, the norm treated as a constant in the gradient (section 4.3).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openqwen.model.quantize import Kind, QuantizedLinear, check
from openqwen.support.errors import OpenQwenError, disk_errors, suggestion
from openqwen.support.files import read_json, refuse_pointer, write_json
from openqwen.support.settings import Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."  # PEFT's wrapper around the network, in the names of its files


class LoraConfig(Settings):
    """The shape of an adapter."""

    rank: int = Field(16, ge=0, description="rank of the update of each matrix")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: list[str] = Field(_TARGETS, min_length=1, description="names of the linear layers that get an adapter")
    dora: bool = Field(False, description="DoRA: learn the length of each row of a matrix apart from its direction")
    base: Literal["none", "int8", "int4"] = Field(
        "none",
        description="while adapters learn, the matrices under them are held in 8 or 4 bits (CPU); none: as loaded",
    )


class LoraLinear(nn.Module):
    """A frozen linear layer and its update. At the start the update is zero: A is random, B is zero."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        self.base = base.requires_grad_(False) if config.base == "none" else _packed(base, config.base)
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
        length_O = self.merged_direction().detach().norm(dim=1)
        out_TO = (F.linear(x_TD, self.base.weight) + update_TO) * (self.magnitude / length_O)
        return out_TO if self.base.bias is None else out_TO + self.base.bias

    def merged_direction(self) -> Tensor:
        """W + s·B·A, [out, in]."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same; of one whose base is not packed."""
        assert isinstance(self.base, nn.Linear)
        weight = self.merged_direction()
        if self.magnitude is not None:
            weight = weight * (self.magnitude / weight.norm(dim=1))[:, None]
        self.base.weight.copy_(weight)
        return self.base.requires_grad_(True)


def _packed(linear: nn.Linear, kind: Kind) -> QuantizedLinear:
    check(kind, linear.weight.device)
    matrix = QuantizedLinear(linear.in_features, {"": linear.out_features}, kind, bias=linear.bias is not None)
    matrix.fill([linear.weight.detach()], [] if linear.bias is None else [linear.bias.detach()])
    return matrix


def add_adapters(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the network and give every linear layer named in `config.targets` an adapter, in place."""
    model.requires_grad_(False)
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in config.targets:
        if target not in found:
            near = suggestion(target, found)
            raise OpenQwenError(f"The network has no linear layer called '{target}'.{near}", where="lora.targets")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.targets:
            _replace(model, name, LoraLinear(module, config, generator))


def merge_adapters(model: nn.Module) -> None:
    """Put every adapter into its matrix, in place: a plain network again, all of it trainable."""
    for name, module in list(_adapters(model)):
        _replace(model, name, module.merged())
    model.requires_grad_(True)


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM load. base: the model adapted."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + n: t.detach().cpu().contiguous() for n, t in _tensors(model)}
    with disk_errors(folder):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": config.targets,
        "use_dora": config.dora,
    }
    write_json(folder / CONFIG, values)


def read_adapter(folder: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What a PEFT folder holds: the adapter's shape, and its tensors under PEFT's names without the prefix.

    shapes: outputs and inputs of the network's linear layers. OpenQwenError where the adapter is of another kind, or
    made for another network.
    """
    config = _read_config(folder / CONFIG)
    try:
        refuse_pointer(folder / WEIGHTS)
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise OpenQwenError(f"The adapter's weights cannot be read: {error}", where=folder / WEIGHTS) from None
    wanted: dict[str, list[int]] = {}
    for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors):
        if layer not in shapes:
            raise OpenQwenError(
                f"This network has no linear layer '{layer}' that the adapter could change.",
                where=folder,
                do="use the network that it was trained for",
            )
        outputs, inputs = shapes[layer]
        wanted |= {f"{layer}.lora_A.weight": [config.rank, inputs], f"{layer}.lora_B.weight": [outputs, config.rank]}
        if config.dora:
            wanted[f"{layer}.lora_magnitude_vector"] = [outputs]
    for name in sorted(wanted.keys() | tensors.keys()):
        need, held = wanted.get(name), list(tensors[name].shape) if name in tensors else None
        if need != held:
            raise OpenQwenError(f"The adapter holds {held} for '{name}'; this network needs {need}.", where=folder)
    return config, tensors


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Give the network the adapter in a PEFT folder, in place. OpenQwenError where it is of another kind or network."""
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config, tensors = read_adapter(folder, shapes)
    add_adapters(model, config, torch.Generator())
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name not in tensors:
                raise OpenQwenError(f"The adapter holds nothing for '{name}'.", where=folder)
            tensor.copy_(tensors[name])
    return config


def _read_config(path: Path) -> LoraConfig:
    values: dict[str, Any] = read_json(path)
    unlike = [
        key
        for key in ("use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform")
        if values.get(key)
    ]
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or unlike:
        what = ", ".join(unlike) or f"peft_type {values.get('peft_type')}, bias {values.get('bias')}"
        raise OpenQwenError(f"This adapter is of a kind that is not supported: {what}.", where=path)
    targets = values["target_modules"]
    return LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        dora=bool(values.get("use_dora")),
    )


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
