"""A recipe or a stage under torchrun: the other ranks join rank 0 in every stage that trains.

    torchrun --nproc-per-node 8 -m openqwen.cli run RECIPE

Rank 0 alone decides what is to be made, reads and writes artifacts, and prints.
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


def under_torchrun() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_stage(stage: "Stage", run: "StageRun") -> dict[str, float]:
    """Run a stage, on all ranks if it trains; only rank 0 calls this."""
    if under_torchrun() and stage.trains_on_ranks:
        _broadcast((stage.run, run))
    return stage.run(run)


def lead_or_follow(lead: Callable[[], int]) -> int:
    """Call `lead` on rank 0; on the other ranks run the stages that it broadcasts.

    Returns the exit status. If rank 0 fails, it broadcasts nothing more, and torchrun stops the
    other ranks.
    """
    from openqwen.train.parallel import join

    if join().main:
        status = lead()
        _broadcast(None)
        return status
    from openqwen.support.progress import console

    console.quiet = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    with tempfile.TemporaryDirectory(prefix="openqwen-rank-") as name:
        number = 0
        while (job := _broadcast(None)) is not None:
            function, run = job
            # Files that a stage writes beside the checkpoint are rank 0's; here they are discarded.
            output = Path(name) / str(number)
            output.mkdir()
            function(replace(run, output=output))
            number += 1
    return 0


def _broadcast(job: object) -> tuple[Callable[["StageRun"], dict[str, float]], "StageRun"] | None:
    """Send rank 0's job to all ranks and return it; the other ranks' arguments are ignored."""
    import torch.distributed as dist

    objects: list = [job]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]
