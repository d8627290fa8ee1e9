"""What each rank of test_rollouts.py runs. Argument: a folder, for what each rank gets."""

import json
import sys
from pathlib import Path

import torch
from fake_generator import rollouts

from openqwen.train.parallel import join

if __name__ == "__main__":
    made = rollouts(join())
    groups = [made.step(step, [3, 0, 2]) for step in range(2)]
    rows = [[(g.prompt, [o.token_ids for o in g.outputs], g.rewards) for g in s] for s in groups]
    told = {"rows": rows, "asked": made.generator.asked, "refreshed": made.generator.refreshed}
    (Path(sys.argv[1]) / f"{join().rank}-of-{join().size}.json").write_text(json.dumps(told))
    join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
