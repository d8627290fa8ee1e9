"""Dual Chunk Attention beside plain attention of the same length.

    python benchmarks/dual_chunk.py [--lengths 4096 8192]

One document through `Packed`, rotation included, at Qwen2-0.5B's heads (14 query, 2 key/value, of
64), float32, one thread. Chunks of 1/4, 1/8 and 1/16 of the length. Three tables:

    time      processor seconds, medians of alternating runs; ratio to plain attention (PyTorch's fused causal one)
    memory    what one forward and backward pass adds to the peak of a fresh process
    gradient  error of the form whose merge weights carry no gradient (the reference code's) and of ours, float64
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from openqwen.model import DualChunk, LongContext, ModelConfig, Packed
from openqwen.model.dual_chunk import attend

HEADS, KV_HEADS, WIDTH = 14, 2, 64
CONFIG = ModelConfig(8, HEADS * WIDTH, 8, 1, HEADS, KV_HEADS)


def chunks(length: int, share: int) -> LongContext:
    """Return chunks of length / share with a window of 1/16 of a chunk; share 0: plain attention."""
    if not share:
        return LongContext()
    return LongContext(
        dual_chunk=DualChunk(length // share + length // share // 16, length // share // 16)
    )


def tensors(length: int) -> list[Tensor]:
    """Queries, keys and values before they are turned, and a gradient."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, h, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *inputs, weight = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*(x.requires_grad_() for x in inputs), weight]


def passes(length: int, share: int, backward: bool) -> Callable[[], None]:
    """One layer's attention."""
    q, k, v, weight = tensors(length)
    packed = Packed.from_lengths([length], chunks(length, share))

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = packed.attend(q, k, v, packed.rotation(packed.positions, CONFIG), 0)
        if backward:
            torch.autograd.grad(out, (q, k, v), weight)

    return run


def seconds(run: Callable[[], None]) -> float:
    """Return the processor time of one call; other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure_time(lengths: list[int], repeats: int) -> None:
    """The first table."""
    print("\n| length | chunk | pass | plain s | dual chunk s | ratio |\n|---|---|---|---|---|---|")
    for length in lengths:
        for share in (4, 8, 16):
            for backward in (False, True):
                runs = [passes(length, s, backward) for s in (0, share)]
                pairs = [[seconds(run) for run in runs] for _ in range(repeats)]
                plain, dual = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(b / a for a, b in pairs)
                name = "forward + backward" if backward else "forward"
                print(
                    (
                        f"| {length} | {length // share} | {name} | {plain:.2f} | {dual:.2f} | "
                        f"{ratio:.2f} |"
                    ),
                    flush=True,
                )


def added_peak(length: int, share: int) -> float:
    """MB that one forward and backward pass adds to this process's peak."""
    torch.set_num_threads(1)
    passes(256, 4 if share else 0, True)()
    run = passes(length, share, True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_memory(lengths: list[int]) -> None:
    """The second table."""
    print("\n| length | plain MB | dual chunk MB | dual chunk KB a token |\n|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for length in lengths:
        found = []
        for share in (0, 8):
            with context.Pool(1) as pool:
                found.append(pool.apply(added_peak, (length, share)))
        plain, dual = found
        print(f"| {length} | {plain:.0f} | {dual:.0f} | {dual * 1024 / length:.1f} |", flush=True)


def detached_merge(queries: list[Tensor], k: Tensor, v: Tensor, chunk_len: int) -> Tensor:
    """Three softmaxes merged by weights without a gradient, dense."""
    i, j = torch.arange(len(k))[:, None], torch.arange(len(k))
    distance = torch.where(j <= i, (i // chunk_len - j // chunk_len).clamp(max=2), -1)
    outs, sums = [], []
    for turn, q in enumerate(queries):
        scores = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])).masked_fill(
            distance != turn, -math.inf
        )
        sums.append(scores.detach().logsumexp(-1).T)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(0.0), v))
    return (torch.stack(sums).softmax(0)[..., None] * torch.stack(outs)).sum(0)


def measure_gradient(repeats: int = 20) -> None:
    """The third table: random data, three chunks, d = 32, as in the facts."""
    errors: dict[str, list[float]] = {"detached merge": [], "ours": []}
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        x = [
            torch.randn(48, 1, 32, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in range(6)
        ]
        *inputs, weight = x
        dense = dense_softmax(inputs[:3], *inputs[3:], 16)
        exact = torch.autograd.grad(dense, inputs[:3], weight)
        for name, form in (("detached merge", detached_merge), ("ours", attend)):
            found = torch.autograd.grad(form(inputs[:3], *inputs[3:], 16), inputs[:3], weight)
            a, b = torch.cat(found), torch.cat(exact)
            errors[name].append(float((a - b).norm() / b.norm()))
    print("\n| form | relative error of dL/dq, mean | range |\n|---|---|---|")
    for name, values in errors.items():
        print(f"| {name} | {statistics.mean(values):.1e} | {min(values):.1e} – {max(values):.1e} |")


def dense_softmax(queries: list[Tensor], k: Tensor, v: Tensor, chunk_len: int) -> Tensor:
    """One softmax over all n × n scores."""
    i, j = torch.arange(len(k))[:, None], torch.arange(len(k))
    distance = (i // chunk_len - j // chunk_len).clamp(0, 2)
    every = torch.stack([torch.einsum("ihd,jhd->hij", q, k) for q in queries])
    scores = every.gather(0, distance.expand(1, *every.shape[1:]))[0] / math.sqrt(k.shape[-1])
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(j > i, -math.inf).softmax(-1), v)


def main() -> None:
    """All three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure_gradient()
    measure_memory(arguments.lengths)
    measure_time(arguments.lengths, arguments.repeats)


if __name__ == "__main__":
    main()
