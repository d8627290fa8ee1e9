"""Perplexity of quantised weights against the source in float32, on 100 kB of real text and code.

    python benchmarks/perplexity.py [--kinds int8 int4] [--threads 2] [--kilobytes 100]

Needs the file of OPENQWEN_REAL_CHECKPOINT (a .gguf) and the texts of OPENQWEN_SHARED_DATA. Half of
the bytes are of speeches, half of programs (HumanEval, MBPP), read in windows of 1,024 tokens.
Prints, for each kind: bits of a weight that a decoded token reads, perplexity of text, of code and
of both, and how much more that is than the source's.
"""

import argparse
import gzip
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
REAL = Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CHECKPOINT = Path(os.environ.get("OPENQWEN_REAL_CHECKPOINT", REAL))
DATA = Path(os.environ.get("OPENQWEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
WINDOW = 1_024


def records(name: str) -> Iterator[dict[str, Any]]:
    """The lines of a file of the shared data."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def held_out(bytes_each: int) -> dict[str, str]:
    """Text and code, so many bytes of each."""
    speeches = (
        record["text"][:8_000] for record in records("corpus/us_presidential_speeches.jsonl.gz")
    )
    human_eval = (
        record["prompt"] + record["canonical_solution"]
        for record in records("eval/HumanEval.jsonl.gz")
    )
    mbpp = (f"# {record['text']}\n{record['code']}" for record in records("eval/mbpp.jsonl.gz"))
    code = [text.replace("\r\n", "\n") for pair in zip(human_eval, mbpp) for text in pair]
    texts = {"text": "\n\n".join(speeches), "code": "\n\n".join(code)}
    return {
        name: text.encode()[:bytes_each].decode(errors="ignore") for name, text in texts.items()
    }


@torch.inference_mode()
def nats(model: Any, ids: torch.Tensor) -> list[float]:
    """The surprise at each token but the first of its window."""
    from openqwen import Packed

    found: list[float] = []
    for window in ids.split(WINDOW):
        hidden = model(window, torch.arange(len(window)), Packed.from_lengths([len(window)]))
        for rows, targets in zip(hidden[:-1].split(128), window[1:].split(128)):
            found += F.cross_entropy(model.logits(rows), targets, reduction="none").tolist()
    return found


def perplexity(surprises: list[float]) -> float:
    """e to the mean."""
    return math.exp(sum(surprises) / len(surprises))


def main() -> None:
    """See the module."""
    from openqwen import load_model, load_tokenizer
    from openqwen.model.quantize import bits_per_weight, quantize

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="*", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kilobytes", type=int, default=100)
    options = parser.parse_args()
    if missing := [path for path in (CHECKPOINT, DATA) if not path.exists()]:
        sys.exit(f"not here: {', '.join(map(str, missing))}")
    torch.set_num_threads(options.threads)
    tokenizer, source = load_tokenizer(CHECKPOINT), load_model(CHECKPOINT)
    ids = {
        name: torch.tensor(tokenizer.encode(text))
        for name, text in held_out(500 * options.kilobytes).items()
    }
    print(
        f"{sum(map(len, ids.values())):,} tokens; {'':>14}"
        + "".join(f"{name:>18}" for name in (*ids, "both"))
    )
    base: list[float] = []
    for kind in ("float32", *options.kinds):
        start = time.perf_counter()
        model = source if kind == "float32" else quantize(source, kind)
        made = time.perf_counter() - start
        surprises = [nats(model, part) for part in ids.values()]
        found = [perplexity(part) for part in (*surprises, [*chain(*surprises)])]
        base = base or found
        bits = 32 if kind == "float32" else bits_per_weight(model)
        columns = "".join(
            f"{ours:10.4f} {100 * (ours / its - 1):+6.2f}%" for ours, its in zip(found, base)
        )
        print(f"{kind:<8} {bits:5.2f} bits {made:6.1f} s {columns}", flush=True)


if __name__ == "__main__":
    main()
