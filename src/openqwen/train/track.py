"""Curves for TensorBoard and Weights & Biases, beside `metrics.jsonl`, which holds them all."""

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
    """Gives what sends a step's metrics, `step` among them, to the trackers asked for; their files
    lie in `folder`.

    label: the name of the run. first: the step it goes on from; what a killed run wrote beyond is
    replaced.
    """
    with ExitStack() as open_ones:
        logs = [
            (_tensorboard if n == "tensorboard" else _wandb)(open_ones, folder / n, label, first)
            for n in names
        ]

        def log(entry: dict[str, float]) -> None:
            for send in logs:
                send(
                    {name: value for name, value in entry.items() if name != "step"},
                    int(entry["step"]),
                )

        yield log


def _tensorboard(
    open_ones: ExitStack, folder: Path, label: str, first: int
) -> Callable[[dict[str, float], int], None]:
    writer = open_ones.enter_context(
        _library("tensorboard").SummaryWriter(str(folder), purge_step=first or None)
    )

    def send(curves: dict[str, float], step: int) -> None:
        for name, value in curves.items():
            writer.add_scalar(f"{label}/{name}", value, step)

    return send


def _wandb(
    open_ones: ExitStack, folder: Path, label: str, first: int
) -> Callable[[dict[str, float], int], None]:
    library = _library("wandb")
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "id"
    if not (first and known.exists()):
        write_text(known, uuid.uuid4().hex)
    name = known.read_text(encoding="utf-8")
    run = library.init(project="openqwen", name=label, dir=str(folder), id=name, resume="allow")
    open_ones.callback(run.finish)
    return lambda curves, step: run.log(curves, step=step)


def _library(tracker: Tracker) -> Any:
    module, package = _PACKAGES[tracker]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise OpenQwenError(
            f"The package '{package}' is not installed.",
            where="train.track",
            do=(
                f"{pip_install(package)}, or leave it out: metrics.jsonl and the report hold the "
                "same curves"
            ),
        ) from None
