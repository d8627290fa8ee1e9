"""Metrics for TensorBoard and Weights & Biases, in addition to `metrics.jsonl`."""

import importlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_text

Tracker = Literal["tensorboard", "wandb"]
Log = Callable[[dict[str, float]], None]
_PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


@contextmanager
def tracking(names: Sequence[Tracker], folder: Path, label: str, first: int) -> Iterator[Log]:
    """A context that gives a function to send a step's metrics (with `step`) to some trackers.

    Args:
        names: The trackers.
        folder: Where their files go.
        label: The name of the run.
        first: The first step to come; what a killed run wrote of it and later steps is replaced.
    """
    start = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        senders = [start[name](stack, folder / name, label, first) for name in names]

        def log(entry: dict[str, float]) -> None:
            values = {name: value for name, value in entry.items() if name != "step"}
            for send in senders:
                send(values, int(entry["step"]))

        yield log


def _tensorboard(
    stack: ExitStack, folder: Path, label: str, first: int
) -> Callable[[dict[str, float], int], None]:
    writer = stack.enter_context(
        _library("tensorboard").SummaryWriter(str(folder), purge_step=first)
    )

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{label}/{name}", value, step)

    return send


def _wandb(
    stack: ExitStack, folder: Path, label: str, first: int
) -> Callable[[dict[str, float], int], None]:
    library = _library("wandb")
    folder.mkdir(parents=True, exist_ok=True)
    id_file = folder / "id"
    if not (first and id_file.exists()):
        write_text(id_file, uuid.uuid4().hex)
    run_id = id_file.read_text(encoding="utf-8")
    run = library.init(project="openqwen", name=label, dir=str(folder), id=run_id, resume="allow")
    stack.callback(run.finish)
    return lambda values, step: run.log(values, step=step)


def _library(tracker: Tracker) -> Any:
    module, package = _PACKAGES[tracker]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise OpenQwenError(
            f"The package '{package}' is not installed.",
            where="train.track",
            do=f"{pip_install(package)}, or leave it out: metrics.jsonl holds the same values",
        ) from None
