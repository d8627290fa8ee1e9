"""LoRA adapters that requests choose for themselves: one network, and to some rows of a call an update of low rank.

The network is left as it is. While a call lasts, hooks on its linear layers add s·B·A·x to the rows of each adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openqwen.model import Qwen2
from openqwen.model.lora import read_adapter
from openqwen.support.errors import OpenQwenError, suggestion


@dataclass(frozen=True, eq=False)
class Adapter:
    """Of each adapted layer, by its name: A [rank, in] and s·B [out, rank]. number: no two that were ever added share
    one, whatever their names."""

    name: str
    number: int
    updates: dict[str, tuple[Tensor, Tensor]]


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
        """Read an adapter in PEFT's format; one of the same name gives way. OpenQwenError where it does not fit."""
        config, tensors = read_adapter(Path(folder))
        if config.dora:
            raise OpenQwenError(
                "A DoRA adapter cannot be chosen by single requests.", where=folder, do="merge it into its model"
            )
        layers = dict(self._model.named_modules())
        updates = {}
        for layer in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
            a, b = (tensors.get(f"{layer}.lora_{side}.weight") for side in "AB")
            linear = layers.get(layer)
            if a is None or b is None or not isinstance(linear, nn.Linear):
                raise OpenQwenError(
                    f"This network has no linear layer '{layer}' that the adapter could change.",
                    where=folder,
                    do="use the network that it was trained for, not quantized",
                )
            if (b.shape[0], a.shape[1]) != linear.weight.shape or a.shape[0] != b.shape[1]:
                raise OpenQwenError(
                    f"The adapter's update of '{layer}' is {b.shape[0]} × {a.shape[1]}; "
                    f"the layer is {linear.out_features} × {linear.in_features}.",
                    where=folder,
                )
            updates[layer] = a.to(linear.weight), b.to(linear.weight) * (config.alpha / config.rank)
        self._added += 1
        self._known[name] = Adapter(name, self._added, updates)

    def remove(self, name: str) -> None:
        """Forget a name; requests that chose it before go on with it."""
        del self._known[self.get(name).name]

    def get(self, name: str) -> Adapter:
        """The adapter of this name. OpenQwenError where there is none."""
        if name not in self._known:
            near = suggestion(name, self._known)
            raise OpenQwenError(
                f"There is no adapter called '{name}'.{near}", where="adapter", do="add it to the engine first"
            )
        return self._known[name]

    @contextmanager
    def on(self, chosen: Sequence[Adapter | None], counts: Sequence[int]) -> Iterator[None]:
        """While the block lasts, rows of the network's calls belong to these adapters: `counts` rows each, in order."""
        rows: dict[Adapter, list[int]] = {}
        start = 0
        for adapter, count in zip(chosen, counts, strict=True):
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(start, start + count))
            start += count
        updates: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for adapter, mine in rows.items():
            rows_R = torch.tensor(mine, device=self._model.device)
            for layer, (a, b) in adapter.updates.items():
                updates.setdefault(layer, []).append((rows_R, a, b))
        hooks = [self._model.get_submodule(n).register_forward_hook(_adding(parts)) for n, parts in updates.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _adding(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], out_TO: Tensor) -> Tensor:
        for rows_R, a, b in parts:
            out_TO.index_add_(0, rows_R, inputs[0][rows_R] @ a.T @ b.T)
        return out_TO

    return hook
