"""What each rank of test_token_cache.py runs. Argument: the folder of the sources."""

import json
import sys
from pathlib import Path

import torch
from token_caches import READERS, samples_of

from openqwen.support.errors import OpenQwenError
from openqwen.train.parallel import join

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind, read in {**READERS, "bad": samples_of}.items():
        try:
            told = read(folder / f"{kind}.jsonl", folder / kind)
        except OpenQwenError as error:
            told = str(error)
        (folder / f"{kind}-{join().rank}.json").write_text(json.dumps(told))
    join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
