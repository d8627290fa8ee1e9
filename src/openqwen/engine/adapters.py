"""LoRA adapters that requests choose for themselves: one network, and to some rows of a call an
update of low rank.

The network is left as it is. While a call lasts, hooks on its linear layers add s·B·A·x to the rows
of each adapter; beside packed weights row by row, so that a row's bits depend on no other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openqwen.model import Qwen2
from openqwen.model.lora import read_adapter
from openqwen.model.quantize import PackedMatrix, QuantizedLinear
from openqwen.support.errors import OpenQwenError, suggestion


class Update(NamedTuple):
    """To outputs `start` and on of the module of this name: A [rank, in] and s·B [out, rank]."""

    module: str
    start: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """number: no two that were ever added share one, whatever their names."""

    number: int
    updates: list[Update]


class Adapters:
    """The adapters that requests may name."""

    def __init__(self, model: Qwen2):
        self._model = model
        self._known: dict[str, Adapter] = {}
        self._added = 0

    @property
    def names(self) -> list[str]:
        """In the order in which they were added."""
        return list(self._known)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's format; one of the same name gives way.

        OpenQwenError where it does not fit.
        """
        places = dict(_places(self._model))
        shapes = {layer: shape for layer, (_, _, *shape) in places.items()}
        read = read_adapter(Path(folder), shapes)
        if any(update.magnitude is not None for update in read.values()):
            raise OpenQwenError(
                "A DoRA adapter cannot be chosen by single requests.",
                where=folder,
                do="merge it into its model",
            )
        updates = []
        for layer, update in read.items():
            a, b = (x.to(self._model.device, self._model.dtype) for x in (update.a, update.b))
            updates.append(Update(*places[layer][:2], a, b * update.scale))
        self._added += 1
        self._known[name] = Adapter(self._added, updates)

    def remove(self, name: str) -> None:
        """Forget a name; requests that chose it before go on with it."""
        self.get(name)
        del self._known[name]

    def get(self, name: str) -> Adapter:
        """The adapter of this name. OpenQwenError where there is none."""
        if name not in self._known:
            near = suggestion(name, self._known)
            raise OpenQwenError(
                f"There is no adapter called '{name}'.{near}",
                where="adapter",
                do="add it to the engine first",
            )
        return self._known[name]

    @contextmanager
    def on(self, chosen: Sequence[Adapter | None], counts: Sequence[int]) -> Iterator[None]:
        """While the block lasts, rows of the network's calls belong to these adapters: `counts`
        rows each, in order.
        """
        rows: dict[Adapter, list[int]] = {}
        start = 0
        for adapter, count in zip(chosen, counts, strict=True):
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(start, start + count))
            start += count
        parts: dict[str, list[tuple[Tensor, Update]]] = {}
        for adapter, mine in rows.items():
            rows_R = torch.tensor(mine, device=self._model.device)
            for update in adapter.updates:
                parts.setdefault(update.module, []).append((rows_R, update))
        hooks = [
            self._model.get_submodule(n).register_forward_hook(_adding(p, start))
            for n, p in parts.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _places(model: Qwen2) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    """Of each linear layer, by its name in the published checkpoints: the module that holds it, its
    first output there, and its outputs and inputs. Not the head, nor experts: they see other
    rows."""
    for name, module in model.named_modules():
        if name == "lm_head" or ".experts." in name:
            continue
        if isinstance(module, nn.Linear):
            yield name, (name, 0, module.out_features, module.in_features)
        elif isinstance(module, QuantizedLinear):
            start, parent = 0, name.rpartition(".")[0]
            for part, outputs in module.parts.items():
                within = (
                    f"{parent}.self_attn"
                    if part in ("q_proj", "k_proj", "v_proj", "o_proj")
                    else parent
                )
                yield f"{within}.{part}", (name, start, outputs, module.inputs)
                start += outputs


def _adding(parts: Sequence[tuple[Tensor, Update]], total: int) -> Callable[..., Tensor]:
    """A hook that adds updates to their rows of the `total` that a module sees, in one call or in
    several.
    """
    done = 0

    def hook(module: nn.Module, inputs: tuple[Any, ...], out_TO: Tensor) -> Tensor:
        nonlocal done
        x_TI, before = (*inputs, None)[:2]
        first, done = done, (done + len(x_TI)) % total
        for rows_R, (_, start, a, b) in parts:
            here_R = rows_R[(rows_R >= first) & (rows_R < first + len(x_TI))] - first
            x_RI = x_TI[here_R] if before is None else before(x_TI[here_R])
            if isinstance(
                module, PackedMatrix
            ):  # products of one row each: as if every row were alone
                many = (len(x_RI), -1, -1)
                change_RO = (x_RI[:, None] @ a.T.expand(many) @ b.T.expand(many)).squeeze(1)
            else:
                change_RO = x_RI @ a.T @ b.T
            out_TO[:, start : start + len(b)].index_add_(0, here_R, change_RO)
        return out_TO

    return hook
