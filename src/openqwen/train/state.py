"""Training states: weights that learn, optimizer, step and generators.

A resumed run gives the bits of an uninterrupted one. A state is a folder `state-<step>` that is
written under another name and renamed, so it is complete or absent. torch.distributed.checkpoint
writes the tensors into safetensors files, each rank its own shards, and any number of ranks can
read them. Where memory has room, the tensors are copied, and a thread writes the copy while
training goes on.
"""

import logging
import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from openqwen.support.device import free_memory
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import fresh_folder, read_json, replace_folder, write_json
from openqwen.support.generators import Generators
from openqwen.support.progress import console
from openqwen.train.eight_bit import empty, parts
from openqwen.train.parallel import World

_NAME = re.compile(r"state-(\d{8})")
_BEST = "best-{:08d}"
_ASIDE = ".state-aside"
_COPY_SHARE = 0.25  # share of the free memory that the copy for the writing thread may take
_FILE_BYTES = 2**28  # of one file, which is built in memory before it is written
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


class StateWriter:
    """Writes the training states of one run, one at a time, and keeps the last `keep` of them.

    Leaving its `with` block, even by Ctrl-C, waits for the state that is being written.
    """

    def __init__(self, scratch: Path, keep: int, world: World):
        self.scratch, self.keep, self.world = scratch, keep, world
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
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        generators: Generators,
        beside: nn.Module | None = None,
    ) -> None:
        """Save the state before step `step`; beside: another network that training changes.

        A full disk gives a warning only: training goes on, and the next state may fit.
        """
        self.wait()
        tensors = _tensors(model, optimizers) | _beside(beside)
        values = {"step": step, "generators": generators.state()}
        if self.world.main:
            fresh_folder(self.scratch / _ASIDE)
        self.world.barrier()
        size = sum(t.nbytes for t in tensors.values())
        in_background = self.world.broadcast(size <= _COPY_SHARE * free_memory())
        if in_background:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(values, tensors), name="training state"
        )
        self._thread.start()
        if not in_background:
            self.wait()

    def save_best(self, step: int, model: nn.Module) -> None:
        """Keep the weights after step `step` as the best."""
        self.wait()
        if self.world.main:
            fresh_folder(self.scratch / _ASIDE)
        self.world.barrier()
        with disk_errors(self.scratch):
            self._write_tensors(_tensors(model, []))
        if self.world.main:
            replace_folder(self.scratch / _ASIDE, self.scratch / _BEST.format(step))

    def wait(self) -> None:
        """Wait until the state is on the disk; raise the writing thread's error if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            with disk_errors(self.scratch):
                self._write_state(values, tensors)
        except OpenQwenError as error:
            shutil.rmtree(self.scratch / _ASIDE, ignore_errors=True)
            console.print(
                f"  The state before step {values['step']} was not saved. {error.what}",
                markup=False,
            )
        except BaseException as error:  # raised again by wait(), in the thread that trains
            self._error = error

    def _write_tensors(self, tensors: dict[str, Tensor]) -> None:
        writer = dcp.HuggingFaceStorageWriter(
            str(self.scratch / _ASIDE), _files(tensors), save_distributed=True
        )
        try:
            _quiet(
                dcp.save,
                tensors,
                storage_writer=writer,
                process_group=self.world.files,
                no_dist=self.world.alone,
            )
        except dcp.CheckpointException as error:  # holds the error of each rank
            raise next(iter(error.failures.values()))[0] from None

    def _write_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        aside, target = self.scratch / _ASIDE, self.scratch / f"state-{values['step']:08d}"
        self._write_tensors(tensors)
        if self.world.main and not target.exists():
            write_json(aside / "state.json", values)
            replace_folder(aside, target)
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the last states, and the best weights that none of these needs."""
        states = _states(self.scratch)
        for old in states[: -self.keep]:
            shutil.rmtree(old)
        # A run that resumes from the oldest state needs the best weights from before it.
        first = states[-self.keep :][0].name.removeprefix("state-")
        best = sorted(self.scratch.glob(_BEST.format(0).replace("0", "[0-9]")))
        for old in [path for path in best if path.name.removeprefix("best-") < first][:-1]:
            shutil.rmtree(old)


def load_state(
    scratch: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generators: Generators,
    world: World,
    beside: nn.Module | None = None,
) -> int:
    """Restore the newest state, written by any number of ranks; return its step, 0 without one."""
    states = _states(scratch)
    if not states:
        return 0
    do = "delete that folder; training goes on from the state before it, or from the start"
    with _named_if_damaged(states[-1], do):
        _read_tensors(states[-1], model, optimizers, world, beside)
        values = read_json(states[-1] / "state.json")
    for optimizer in optimizers:
        _fill_rows(optimizer)
    generators.restore(values["generators"])
    return int(values["step"])


def load_best(scratch: Path, step: int, model: nn.Module, world: World) -> None:
    """Give the model the weights that were kept as the best, those after step `step`."""
    folder = scratch / _BEST.format(step)
    do = "set validation.outcome to last, or delete the folder above it and train again"
    with _named_if_damaged(folder, do):
        _read_tensors(folder, model, [], world)


def _read_tensors(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    world: World,
    beside: nn.Module | None = None,
) -> None:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = _targets(model, optimizers, reader.read_metadata().state_dict_metadata)
    tensors |= _beside(beside)
    _quiet(dcp.load, tensors, storage_reader=reader, process_group=world.files, no_dist=world.alone)


@contextmanager
def _named_if_damaged(folder: Path, do: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[-1]
        raise OpenQwenError(
            f"A saved training state cannot be read: {reason}", where=folder, do=do
        ) from None


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The tensors to save: `weights.<parameter>`, and `<key>.<parameter>` of the optimizers."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {f"weights.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                halves = {f"{key}-{part}": half for part, half in parts(value).items()}
                tensors |= {
                    f"{k}.{names[id(parameter)]}": v.detach()
                    for k, v in (halves or {key: value}).items()
                }
    return tensors


def _beside(network: nn.Module | None) -> dict[str, Tensor]:
    """`beside.<parameter>` of the other network, where there is one."""
    if network is None:
        return {}
    return {f"beside.{n}": p.detach() for n, p in network.named_parameters()}


def _targets(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensor to read each saved one into: a weight, or a new tensor in an optimizer's state."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    targets = {f"weights.{n}": p.detach() for n, p in parameters.items()}
    for name, entry in saved.items():
        key, _, parameter_name = name.partition(".")
        shape, dtype = tuple(entry.size), entry.properties.dtype
        if key in ("weights", "beside") or parameter_name not in parameters:
            continue
        parameter = parameters[parameter_name]
        moment, _, part = key.partition("-")
        state = owners[id(parameter)].state[parameter]
        if part:
            state.setdefault(moment, empty(parameter, signed=moment == "exp_avg"))
            targets[name] = parts(state[moment])[part]
            continue
        # A moment is sharded as its parameter is. AdamW's step count is a tensor of its own.
        is_moment = shape == tuple(parameter.shape) and shape != () and dtype == parameter.dtype
        other = torch.zeros(shape, dtype=dtype, device=parameter.device)
        target = torch.zeros_like(parameter) if is_moment else other
        state[key] = targets[name] = target.detach()
    return targets


def _fill_rows(optimizer: torch.optim.Optimizer) -> None:
    """Complete the moments of earlier versions' states, which had `rows` of an embedding only."""
    for parameter, state in optimizer.state.items():
        if (rows := state.pop("rows", None)) is None:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            full = state[key].new_zeros(parameter.shape)
            full[rows] = state[key][: len(rows)]
            if isinstance(parameter, DTensor):
                full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            state[key] = full


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The file, counted from 1, that each tensor goes to."""
    files, file, size = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files


def _quiet(function: Any, *arguments: Any, **options: Any) -> None:
    """Call without PyTorch's warnings that a single process saves or loads, which is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*arguments, **options)


def _states(scratch: Path) -> list[Path]:
    """Complete states, the oldest first."""
    return sorted(p for p in scratch.iterdir() if _NAME.fullmatch(p.name))
