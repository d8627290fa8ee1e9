"""Perplexity with a cache in float32, in int8, and in int8 with the key bias left in.

    python benchmarks/cache_perplexity.py [--kilobytes 100] [--window 2048] [--chunk 512] [--growth]

Needs the file of OPENQWEN_REAL_CHECKPOINT (a .gguf) and the texts of OPENQWEN_SHARED_DATA: half
speeches, half Python programs. The text is cut into windows, each read teacher-forced through the
cache in chunks, in float32 on the CPU. The claim is that int8 raises the perplexity by less than
0.5 %.

--growth: instead, a conversation that outgrows its profile. A window stands in for a trained length
of half its size: its first half is read plainly, and the second half under YARN x 2 after (a)
turning the cached keys anew and (b) reading the first half again under YARN x 2; (c) is the
checkpoint as it is, which reads the whole window natively.
"""

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen import load_model, load_tokenizer
from openqwen.model import Cache, LongContext, Paged, Qwen2, Yarn, paged

ROOT = Path(__file__).parent.parent
REAL = Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CHECKPOINT = Path(os.environ.get("OPENQWEN_REAL_CHECKPOINT", REAL))
DATA = Path(os.environ.get("OPENQWEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
PAGE = 16


def text(name: str, fields: tuple[str, ...], size: int) -> str:
    """The first `size` characters of a file's records, the first record left out."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file][1:]
    return "\n\n".join("".join(record[field] for field in fields) for record in records)[:size]


def read(
    model: Qwen2,
    cache: Cache,
    tokens: Tensor,
    chunk: int,
    way: LongContext | None = None,
    start: int = 0,
) -> Tensor:
    """Return the negative log-likelihoods of tokens[start + 1:]; the cache holds those before."""
    table, losses = torch.arange(cache.pages)[None], []
    for at in range(start, len(tokens), chunk):
        some = tokens[at : at + chunk]
        total = at + len(some)
        hidden = model(
            some, torch.arange(at, total), Paged(cache, table, [total], [len(some)], way)
        )
        targets = tokens[at + 1 : total + 1]
        for h, t in zip(hidden[: len(targets)].split(128), targets.split(128), strict=True):
            losses.append(F.cross_entropy(model.logits(h), t, reduction="none"))
    return torch.cat(losses)


def formats(model: Qwen2, windows: list[Tensor], chunk: int) -> None:
    """Perplexity of each format, and its rise over float32."""

    def naive(pages: int) -> Cache:
        return Cache(model.config, pages, PAGE, "int8")

    makers: dict[str, Callable[[int], Cache]] = {
        "float": lambda pages: Cache.of(model, pages, PAGE),
        "int8": lambda pages: Cache.of(model, pages, PAGE, "int8"),
        "int8, bias left in": naive,
    }
    losses: dict[str, list[Tensor]] = {name: [] for name in makers}
    for number, tokens in enumerate(windows):
        for name, make in makers.items():
            losses[name].append(read(model, make(-(-len(tokens) // PAGE)), tokens, chunk))
        found = {name: math.exp(torch.cat(parts).double().mean()) for name, parts in losses.items()}
        print(f"after {number + 1} of {len(windows)} windows:", flush=True)
        for name, perplexity in found.items():
            print(
                f"  {name:20} perplexity {perplexity:12.4f}  "
                f"{100 * (perplexity / found['float'] - 1):+10.3f} %"
            )


def growth(model: Qwen2, windows: list[Tensor], chunk: int) -> None:
    """Mean loss of the second halves, three ways, and the processor time that growing took."""
    found: dict[str, list[Tensor]] = {"turned anew": [], "read again": [], "native": []}
    seconds = dict.fromkeys(found, 0.0)
    for tokens in windows:
        half = len(tokens) // 2 // PAGE * PAGE
        way = LongContext(Yarn(2.0, half))
        for name, parts in found.items():
            cache = Cache.of(model, -(-len(tokens) // PAGE), PAGE)
            read(model, cache, tokens[:half], chunk, LongContext())
            start = time.process_time()
            if name == "turned anew":
                cache.rotate_keys(range(cache.pages), range(half), LongContext(), way)
            elif name == "read again":
                read(model, cache, tokens[:half], chunk, way)
            seconds[name] += time.process_time() - start
            parts.append(
                read(model, cache, tokens, chunk, LongContext() if name == "native" else way, half)
            )
        for name, parts in found.items():
            first = torch.stack([part[:64] for part in parts]).mean()
            print(
                f"  {name:12} mean loss {torch.cat(parts).mean():8.4f}, of the first 64 tokens "
                f"{first:8.4f}, "
                f"growing took {seconds[name]:8.3f} s of processor time",
                flush=True,
            )


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kilobytes", type=float, default=100)
    parser.add_argument("--window", type=int, default=2_048)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    tokenizer, model = load_tokenizer(CHECKPOINT), load_model(CHECKPOINT)
    half = int(options.kilobytes * 500)
    texts = [
        text("corpus/us_presidential_speeches.jsonl.gz", ("text",), half),
        text("eval/HumanEval.jsonl.gz", ("prompt", "canonical_solution"), half),
    ]
    pieces = [torch.tensor(tokenizer.encode(t)).split(options.window) for t in texts]
    windows = [w for piece in pieces for w in piece if len(w) > options.window // 4]
    print(f"{sum(map(len, windows)):,} tokens in {len(windows)} windows", flush=True)
    print(f"compiled attention: {paged.has_kernel(Cache.of(model, 1, PAGE))}", flush=True)
    (growth if options.growth else formats)(model, windows, options.chunk)


if __name__ == "__main__":
    main()
