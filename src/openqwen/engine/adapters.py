"""LoRA adapters that requests choose: some rows of a call get an update of low rank.

The network itself does not change. During a call, hooks on its linear layers add s·B·A·x to the
rows of each adapter. With packed weights each row is a product of its own, so that its bits do not
depend on other rows.
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

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRankUpdate(NamedTuple):
    """A [rank, in] and s·B [out, rank], added to a module's outputs from number `start` on."""

    module: str
    start: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's updates. No two adapters that were ever added have the same number."""

    number: int
    updates: list[LowRankUpdate]


class Adapters:
    """The adapters that requests can choose by name."""

    def __init__(self, model: Qwen2):
        self._model = model
        self._known: dict[str, Adapter] = {}
        self._added = 0

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were added."""
        return list(self._known)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's format; it replaces one of the same name.

        Raises:
            OpenQwenError: it does not fit the network, or cannot be read.
        """
        places = dict(_linear_layers(self._model))
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
            module, start, *_ = places[layer]
            a, b = (x.to(self._model.device, self._model.dtype) for x in (update.a, update.b))
            updates.append(LowRankUpdate(module, start, a, b * update.scale))
        self._added += 1
        self._known[name] = Adapter(self._added, updates)

    def remove(self, name: str) -> None:
        """Remove a name; requests that chose it before still use the adapter."""
        self.get(name)
        del self._known[name]

    def get(self, name: str) -> Adapter:
        """The adapter of this name. Raises OpenQwenError where there is none."""
        if name not in self._known:
            near = suggestion(name, self._known)
            raise OpenQwenError(
                f"There is no adapter called '{name}'.{near}",
                where="adapter",
                do="add it to the engine first",
            )
        return self._known[name]

    @contextmanager
    def applied(self, adapters: Sequence[Adapter | None], counts: Sequence[int]) -> Iterator[None]:
        """Apply adapters to the rows of the network's calls while the block lasts.

        counts: the number of rows of each entry of `adapters`, in order.
        """
        rows_of: dict[Adapter, list[int]] = {}
        total = 0
        for adapter, count in zip(adapters, counts, strict=True):
            if adapter is not None:
                rows_of.setdefault(adapter, []).extend(range(total, total + count))
            total += count
        parts: dict[str, list[tuple[Tensor, LowRankUpdate]]] = {}
        for adapter, rows in rows_of.items():
            rows_R = torch.tensor(rows, device=self._model.device)
            for update in adapter.updates:
                parts.setdefault(update.module, []).append((rows_R, update))
        hooks = []
        for name, updates in parts.items():
            module = self._model.get_submodule(name)
            hooks.append(module.register_forward_hook(_hook(updates, total)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _linear_layers(model: Qwen2) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    """Each linear layer's name in published checkpoints, and its place in the network.

    The place is the module that holds it, the number of its first output there, its outputs and
    its inputs. The head and the experts are left out, since their rows are not those of the call.
    """
    for name, module in model.named_modules():
        if name == "lm_head" or ".experts." in name:
            continue
        if isinstance(module, nn.Linear):
            yield name, (name, 0, module.out_features, module.in_features)
        elif isinstance(module, QuantizedLinear):
            start, parent = 0, name.rpartition(".")[0]
            for part, outputs in module.parts.items():
                layer = f"{parent}.self_attn" if part in _ATTENTION else parent
                yield f"{layer}.{part}", (name, start, outputs, module.inputs)
                start += outputs


def _hook(parts: Sequence[tuple[Tensor, LowRankUpdate]], total: int) -> Callable[..., Tensor]:
    """A hook that adds updates to their rows. The module sees `total` rows, in one call or more."""
    done = 0

    def hook(module: nn.Module, inputs: tuple[Any, ...], out_TO: Tensor) -> Tensor:
        nonlocal done
        x_TI, before = (*inputs, None)[:2]
        first, done = done, (done + len(x_TI)) % total
        for rows_R, (_, start, a, b) in parts:
            here_R = rows_R[(rows_R >= first) & (rows_R < first + len(x_TI))] - first
            x_RI = x_TI[here_R] if before is None else before(x_TI[here_R])
            if isinstance(module, PackedMatrix):  # one product for each row
                batch = (len(x_RI), -1, -1)
                change_RO = (x_RI[:, None] @ a.T.expand(batch) @ b.T.expand(batch)).squeeze(1)
            else:
                change_RO = x_RI @ a.T @ b.T
            out_TO[:, start : start + len(b)].index_add_(0, here_R, change_RO)
        return out_TO

    return hook
