"""A recipe or a stage under torchrun: rank 0 leads, the other ranks join it in every stage that
trains.

    torchrun --nproc-per-node 8 -m openqwen.cli run RECIPE

Rank 0 alone decides what is to be made, reads and writes artifacts, and speaks to the user.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openqwen.support.stage import Stage, StageRun


def many() -> bool:
    """Whether torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_stage(stage: "Stage", run: "StageRun") -> dict[str, float]:
    """Run a stage, on all ranks where it trains; only rank 0 calls this."""
    if many() and stage.trains_on_ranks:
        _tell((stage.run, run))
    return stage.run(run)


def lead_or_follow(lead: Callable[[], int]) -> int:
    """On rank 0, lead; on the others, join until it is done. Returns the exit status.

    Where rank 0 fails, it says nothing more, and torchrun ends the others.
    """
    from openqwen.train.parallel import join

    if join().main:
        status = lead()
        _tell(None)
        return status
    from openqwen.support.progress import console

    console.quiet = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    with tempfile.TemporaryDirectory(prefix="openqwen-rank-") as name:
        number = 0
        while (told := _listen()) is not None:
            function, run = told
            output = Path(name) / str(
                number
            )  # what a stage writes beside the checkpoint, rank 0 writes too
            output.mkdir()
            function(replace(run, output=output))
            number += 1
    return 0


def _tell(word: object) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([word], src=0)


def _listen() -> tuple[Callable[["StageRun"], dict[str, float]], "StageRun"] | None:
    import torch.distributed as dist

    word: list = [None]
    dist.broadcast_object_list(word, src=0)
    return word[0]
