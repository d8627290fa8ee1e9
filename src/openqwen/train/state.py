"""Training states: weights that learn, optimizer, step and generators. A resumed run gives an
uninterrupted run's bits.

A state is a folder `state-<step>` that is written aside and renamed: whole or absent. Tensors go
through torch.distributed.checkpoint into safetensors files, each rank its own shards, and come back
on any number of ranks; no pickle. They are copied first and written by a thread while training goes
on, where memory has room for the copy.
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
from openqwen.train.optimizer import TableAdamW
from openqwen.train.parallel import World, join

_NAME = re.compile(r"state-(\d{8})")
_BEST = "best-{:08d}"
_ASIDE = ".state-aside"
_COPY_SHARE = 0.25  # of the free memory, which the copy for a writing thread may take
_FILE_BYTES = 2**28  # of one file; it is put together in memory before it is written
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


class StateWriter:
    """Saves training states of one run, the last `keep` of them. One is written at a time.

    Leaving its `with` block, even by Ctrl-C, waits for the state that is being written.
    """

    def __init__(self, scratch: Path, keep: int, world: World | None = None):
        self.scratch, self.keep = scratch, keep
        self.world = world or join()
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
    ) -> None:
        """Save the state before step `step`.

        A full disk is a warning: training goes on and the next save may fit.
        """
        self.wait()
        tensors = _tensors(model, optimizers)
        values = {"step": step, "generators": generators.state()}
        if self.world.main:
            fresh_folder(self.scratch / _ASIDE)
        self.world.barrier()
        aside = self.world.broadcast(
            sum(t.nbytes for t in tensors.values()) <= _COPY_SHARE * free_memory()
        )
        if aside:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(values, tensors), name="training state"
        )
        self._thread.start()
        if not aside:
            self.wait()

    def save_best(self, step: int, model: nn.Module) -> None:
        """Keep the weights behind step `step` in place of those kept as the best before."""
        self.wait()
        if self.world.main:
            fresh_folder(self.scratch / _ASIDE)
        self.world.barrier()
        with disk_errors(self.scratch):
            self._write_tensors(_tensors(model, []))
        if self.world.main:
            for old in self.scratch.glob(_BEST.format(0).replace("0", "[0-9]")):
                shutil.rmtree(old)
            replace_folder(self.scratch / _ASIDE, self.scratch / _BEST.format(step))

    def wait(self) -> None:
        """Until what is being written is on the disk.

        Errors of the writing thread come out here.
        """
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
        except dcp.CheckpointException as error:  # holds what went wrong on each rank
            raise next(iter(error.failures.values()))[0] from None

    def _write_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        aside, target = self.scratch / _ASIDE, self.scratch / f"state-{values['step']:08d}"
        self._write_tensors(tensors)
        if self.world.main and not target.exists():
            write_json(aside / "state.json", values)
            replace_folder(aside, target)
            for old in _states(self.scratch)[: -self.keep]:
                shutil.rmtree(old)


def load_state(
    scratch: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generators: Generators,
    world: World | None = None,
) -> int:
    """Restore the newest state, made on any number of ranks, and return its step; 0 where there is
    none.
    """
    world = world or join()
    states = _states(scratch)
    if not states:
        return 0
    with _named_if_damaged(
        states[-1], "delete that folder; training goes on from the one before it, or the start"
    ):
        _read_tensors(states[-1], model, optimizers, world)
        values = read_json(states[-1] / "state.json")
    for optimizer in optimizers:
        if not isinstance(optimizer, TableAdamW):
            _fill_rows(optimizer)
    generators.restore(values["generators"])
    return int(values["step"])


def load_best(scratch: Path, step: int, model: nn.Module, world: World) -> None:
    """Give the model the weights that were kept as the best, behind step `step`."""
    folder = scratch / _BEST.format(step)
    with _named_if_damaged(
        folder, "set validation.outcome to last, or delete the folder above it and train again"
    ):
        _read_tensors(folder, model, [], world)


def _read_tensors(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], world: World
) -> None:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = _places(model, optimizers, reader.read_metadata().state_dict_metadata)
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
    """What is saved: `weights.<parameter>`, and `<what>.<parameter>` of the optimizers."""
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


def _places(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Where each saved tensor belongs: the weights themselves, and new tensors in the optimizers'
    states.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    places = {f"weights.{n}": p.detach() for n, p in parameters.items()}
    for name, entry in saved.items():
        key, _, parameter_name = name.partition(".")
        shape, dtype = tuple(entry.size), entry.properties.dtype
        if key == "weights" or parameter_name not in parameters:
            continue
        parameter = parameters[parameter_name]
        moment, _, part = key.partition("-")
        state = owners[id(parameter)].state[parameter]
        if part:
            state.setdefault(moment, empty(parameter, signed=moment == "exp_avg"))
            places[name] = parts(state[moment])[part]
            continue
        like_it = shape == tuple(parameter.shape) and shape != () and dtype == parameter.dtype
        # AdamW keeps its step count beside the parameter; fused and plain alike read it as a float
        # tensor.
        other = torch.zeros(shape, dtype=dtype, device=parameter.device)
        place = torch.zeros_like(parameter) if like_it else other
        state[key] = places[name] = place.detach()
    return places


def _fill_rows(optimizer: torch.optim.Optimizer) -> None:
    """Moments that `TableAdamW` kept for some rows, for an optimizer that keeps all."""
    for parameter, state in optimizer.state.items():
        if (rows := state.pop("rows", None)) is None:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            whole = state[key].new_zeros(parameter.shape)
            whole[rows] = state[key][: len(rows)]
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            state[key] = whole


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The file, counted from 1, that each tensor goes to."""
    files, file, size = dict[str, int](), 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _FILE_BYTES:
            file, size = file + 1, 0
        files[name] = file
        size += tensor.nbytes
    return files


def _quiet(act: Any, *arguments: Any, **options: Any) -> None:
    """Call without PyTorch's warnings that one process alone is saving or loading, which is what is
    meant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act(*arguments, **options)


def _states(scratch: Path) -> list[Path]:
    """Finished states, oldest first."""
    return sorted(p for p in scratch.iterdir() if _NAME.fullmatch(p.name))
