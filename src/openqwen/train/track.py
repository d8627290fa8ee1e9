"""Curves for TensorBoard and Weights & Biases, beside `metrics.jsonl`, which holds them all."""

import importlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_text

Tracker = Literal["tensorboard", "wandb"]
_PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


class Tracking:
    """Sends each step's metrics to the trackers that are asked for. Their files lie in `folder`, by name."""

    def __init__(self, names: Sequence[Tracker], folder: Path, label: str, first: int):
        """label: the name of the run. first: the step it goes on from; what a killed run wrote beyond is replaced."""
        self._log: list[Callable[[dict[str, float]], None]] = []
        self._close: list[Callable[[], Any]] = []
        for name in names:
            module, package = _PACKAGES[name]
            try:
                library = importlib.import_module(module)
            except ImportError:
                raise OpenQwenError(
                    f"The package '{package}' is not installed.",
                    where="train.track",
                    do=f"pip install {package}, or leave it out: metrics.jsonl and the report hold the same curves",
                ) from None
            (self._tensorboard if name == "tensorboard" else self._wandb)(library, folder / name, label, first)

    def _tensorboard(self, library: Any, folder: Path, label: str, first: int) -> None:
        writer = library.SummaryWriter(str(folder), purge_step=first or None)

        def log(entry: dict[str, float]) -> None:
            for name, value in _curves(entry).items():
                writer.add_scalar(f"{label}/{name}", value, int(entry["step"]))

        self._log.append(log)
        self._close.append(writer.close)

    def _wandb(self, library: Any, folder: Path, label: str, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "id"
        if not (first and known.exists()):
            write_text(known, uuid.uuid4().hex)
        run = library.init(
            project="openqwen", name=label, dir=str(folder), id=known.read_text(encoding="utf-8"), resume="allow"
        )
        self._log.append(lambda entry: run.log(_curves(entry), step=int(entry["step"])))
        self._close.append(run.finish)

    def log(self, entry: dict[str, float]) -> None:
        """The metrics of one step, `step` among them."""
        for log in self._log:
            log(entry)

    def close(self) -> None:
        """Write what is still held back."""
        for close in self._close:
            close()


def _curves(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}
