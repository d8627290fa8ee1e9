"""Training states: weights, optimizer, step and generators, so that a resumed run gives an uninterrupted run's bits.

A state is a folder `state-<step>` that is written aside and renamed: whole or absent. safetensors and JSON, no pickle.
"""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import fresh_folder, read_json, replace_folder, write_json
from openqwen.support.generators import Generators

_KEEP = 2
_NAME = re.compile(r"state-(\d{8})")


def save_state(
    scratch: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, generators: Generators
) -> None:
    """Save the state before step `step`; the last two are kept."""
    names = {id(p): n for n, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            moments[f"{key}.{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    aside = fresh_folder(scratch / ".state-aside")
    with disk_errors(scratch):
        save_file(weights, aside / "weights.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
    write_json(aside / "state.json", {"step": step, "generators": generators.state()})
    target = scratch / f"state-{step:08d}"
    if target.exists():
        return
    replace_folder(aside, target)
    for old in _states(scratch)[:-_KEEP]:
        shutil.rmtree(old)


def load_state(scratch: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generators: Generators) -> int:
    """Restore the newest state and return its step; 0 where there is none."""
    states = _states(scratch)
    if not states:
        return 0
    folder = states[-1]
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(weights[name])
    except Exception as error:
        raise OpenQwenError(
            f"A saved training state cannot be read: {error}",
            where=folder,
            do="delete that folder; training goes on from the state before it, or from the start",
        ) from None
    for parameter_name, parameter in model.named_parameters():
        entries = {k.split(".", 1)[0]: v for k, v in moments.items() if k.split(".", 1)[1] == parameter_name}
        if entries:
            # AdamW keeps its step count beside the parameter; fused and plain alike read it as a float tensor.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in entries.items()}
    values = read_json(folder / "state.json")
    generators.restore(values["generators"])
    return int(values["step"])


def _states(scratch: Path) -> list[Path]:
    """Finished states, oldest first."""
    return sorted(p for p in scratch.iterdir() if _NAME.fullmatch(p.name))
