"""Attention over a paged cache: processor time of the compiled and the plain path.

    OMP_NUM_THREADS=1 python benchmarks/paged.py [--heads 14] [--kv-heads 2] [--width 64] [--layers 24]
        [--repeat 5]

Layers of the real 0.5B's shape, one after the other, as a forward call reads them: the rotary turn,
the write into pages and the attention. Each load runs on each path in turn, `repeat` times; printed
are the median milliseconds of one layer and the ratio, and for the compiled path the rate of the
two matrix products that exact causal attention needs. Also prints the rate of a float32 matrix
product of PyTorch, the yardstick for the rates.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch

from openqwen.model import Cache, ModelConfig, Paged, paged

LOADS = {  # sequences, keys of each with the new ones, new tokens of each
    "decode, 512 keys": (1, 512, 1),
    "decode, 4,096 keys": (1, 4_096, 1),
    "decode, 16 x 1,024 keys": (16, 1_024, 1),
    "prefill of 1,024": (1, 1_024, 1_024),
    "prefill of 16 x 64": (16, 64, 64),
    "512 more after 3,584": (1, 4_096, 512),
}
PAGE = 16


def cost(run: Callable[[], object]) -> float:
    """Processor seconds of one call, over enough calls to be measured."""
    calls, spent = 0, 0.0
    while spent < 0.05 or calls < 8:
        start = time.process_time()
        run()
        spent += time.process_time() - start
        calls += 1
    return spent / calls


def prepared(
    config: ModelConfig, load: tuple[int, int, int], format: str
) -> tuple[Callable[[], object], ...]:
    """The compiled and the plain call of one layer, on a full cache."""
    sequences, total, new = load
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pages = -(-total // PAGE)
    bias = torch.randn(config.num_hidden_layers, kv_heads, width)
    cache = Cache(config, pages * sequences, PAGE, format, key_bias_NKd=bias)
    cache.keys.random_(-2, 3)
    cache.values.random_(-2, 3)
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.fill_(0.5)
    tables = torch.randperm(pages * sequences).view(sequences, pages)
    merged = torch.randn(sequences * new, (heads + 2 * kv_heads) * width).unflatten(1, (-1, width))
    parts = merged.split([heads, kv_heads, kv_heads], dim=1)
    attention = Paged(cache, tables, [total] * sequences, [new] * sequences)
    rotation = attention.rotation(torch.arange(total - new, total).repeat(sequences), config)
    layers = cycle(range(config.num_hidden_layers))
    return tuple(
        lambda way=way: way(*parts, rotation, next(layers))  # type: ignore[misc]
        for way in (attention.attend, attention._plain)
    )


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = ModelConfig(
        8, options.heads * options.width, 8, options.layers, options.heads, options.kv_heads
    )
    print(
        f"compiled: {paged.has_kernel(Cache(config, 1, PAGE))}, threads {torch.get_num_threads()}"
    )
    one, other = torch.randn(1_024, 1_024), torch.randn(1_024, 1_024)
    matmul = statistics.median(cost(lambda: one @ other) for _ in range(options.repeat))
    print(f"float32 matrix product: {2 * 1_024**3 / matmul / 1e9:.0f} GFLOP/s")
    print(f"{'':26}{'format':>8}{'compiled ms':>13}{'plain ms':>11}{'ratio':>8}{'GFLOP/s':>9}")
    for name, load in LOADS.items():
        for format in ("float", "int8"):
            pair = prepared(config, load, format)
            times = [[cost(run) for run in pair] for _ in range(options.repeat)]
            ours, plain = (statistics.median(column) for column in zip(*times, strict=True))
            sequences, total, new = load
            seen = sequences * sum(range(total - new + 1, total + 1))
            rate = 4 * seen * options.heads * options.width / ours / 1e9
            print(
                f"{name:26}{format:>8}{ours * 1e3:13.3f}{plain * 1e3:11.3f}{plain / ours:8.1f}{rate:9.0f}"
            )


if __name__ == "__main__":
    main()
