"""What each rank of test_rollouts.py runs. Arguments: a folder for what each rank gets, and the
rank that cannot grade, if one cannot.
"""

import json
import sys
from pathlib import Path

import torch
from fake_generator import rollouts

from openqwen.support.errors import OpenQwenError
from openqwen.train.parallel import join
from openqwen.train.trainer import EpisodeError


def fail(indices, outputs):
    """Stands for a reward that breaks."""
    raise OpenQwenError("no reward here", where=Path("somewhere"))


if __name__ == "__main__":
    made, told = rollouts(join()), {}
    if sys.argv[2:] == [str(join().rank)]:
        made.grade = fail
    try:
        groups = [made.step(step, [3, 0, 2]) for step in range(2)]
        rows = [
            [(g.prompt, [o.token_ids for o in g.outputs], g.rewards) for g in s] for s in groups
        ]
        told = {"rows": rows, "asked": made.generator.asked}
    except EpisodeError as error:
        told = {"error": str(error)}
    told["refreshed"] = made.generator.refreshed
    (Path(sys.argv[1]) / f"{join().rank}-of-{join().size}.json").write_text(json.dumps(told))
    join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
