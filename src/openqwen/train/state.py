"""Training states, so that a resumed run gives an uninterrupted run's bits.

Weights that learn, optimizer, step and generators.

A state is a folder `state-<step>` that is written aside and renamed: whole or absent. safetensors and JSON, no pickle.
Tensors are copied first and written by a thread while training goes on, where memory has room for the copy.
"""

import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openqwen.support.device import free_memory
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import fresh_folder, read_json, replace_folder, write_json
from openqwen.support.generators import Generators
from openqwen.support.progress import console

_NAME = re.compile(r"state-(\d{8})")
_COPY_SHARE = 0.25  # of the free memory, which the copy for a writing thread may take


class StateWriter:
    """Saves training states of one run, the last `keep` of them. One is written at a time.

    Leaving its `with` block, even by Ctrl-C, waits for the state that is being written.
    """

    def __init__(self, scratch: Path, keep: int):
        self.scratch, self.keep = scratch, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def save(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], generators: Generators
    ) -> None:
        """Save the state before step `step`. A full disk is a warning: training goes on and the next save may fit."""
        self.wait()
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        moments = _moments(model, optimizers)
        size = sum(t.nbytes for tensors in (weights, moments) for t in tensors.values())
        values = {"step": step, "generators": generators.state()}
        aside = size <= _COPY_SHARE * free_memory()
        if aside:
            weights, moments = _copied(weights), _copied(moments)
        self._thread = threading.Thread(target=self._write, args=(values, weights, moments), name="training state")
        self._thread.start()
        if not aside:
            self.wait()

    def wait(self) -> None:
        """Until what is being written is on the disk. Errors of the writing thread come out here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, values: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        try:
            _write_state(self.scratch, values, weights, moments)
            for old in _states(self.scratch)[: -self.keep]:
                shutil.rmtree(old)
        except OpenQwenError as error:
            shutil.rmtree(self.scratch / _ASIDE, ignore_errors=True)
            console.print(f"  The state before step {values['step']} was not saved. {error.what}", markup=False)
        except BaseException as error:  # raised again by wait(), in the thread that trains
            self._error = error


_ASIDE = ".state-aside"


def _write_state(scratch: Path, values: dict[str, Any], weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    target = scratch / f"state-{values['step']:08d}"
    if target.exists():
        return
    aside = fresh_folder(scratch / _ASIDE)
    with disk_errors(scratch):
        save_file({n: t.cpu().contiguous() for n, t in weights.items()}, aside / "weights.safetensors")
        save_file({n: t.cpu().contiguous() for n, t in moments.items()}, aside / "optimizer.safetensors")
    write_json(aside / "state.json", values)
    replace_folder(aside, target)


def _moments(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' tensors by `<what>.<parameter>`."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{key}.{names[id(parameter)]}": value.detach()
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def load_state(
    scratch: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], generators: Generators
) -> int:
    """Restore the newest state and return its step; 0 where there is none."""
    states = _states(scratch)
    if not states:
        return 0
    folder = states[-1]
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(weights[name])
    except Exception as error:
        raise OpenQwenError(
            f"A saved training state cannot be read: {error}",
            where=folder,
            do="delete that folder; training goes on from the state before it, or from the start",
        ) from None
    parameters = dict(model.named_parameters())
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, value in moments.items():
        key, _, parameter_name = name.partition(".")
        parameter = parameters[parameter_name]
        # AdamW keeps its step count beside the parameter; fused and plain alike read it as a float tensor.
        owners[id(parameter)].state[parameter][key] = value.to(parameter.device)
    values = read_json(folder / "state.json")
    generators.restore(values["generators"])
    return int(values["step"])


def _states(scratch: Path) -> list[Path]:
    """Finished states, oldest first."""
    return sorted(p for p in scratch.iterdir() if _NAME.fullmatch(p.name))
