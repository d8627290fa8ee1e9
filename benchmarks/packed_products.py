"""Speed of the quantised kernels, and what share of the machine's ceilings that is.

    python benchmarks/packed_products.py [--threads 1 2] [--layers 24] [--only ceilings products forward]

ceilings: the rate at which memory is read (512 MB, larger than any cache), and float32
multiplication. products: one layer's matrices of a 0.5B and its output matrix, for 1 to 512 rows;
of 1 row all layers are read in turn, so that weights come from memory as they do in decoding. GB/s
are packed weights read, GOP/s two operations a weight and row.
forward: a whole network of that shape with random weights, no attention to speak of: prefill of
1,024 tokens, decode steps of 1 and 16 sequences. Wall time, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from openqwen import ModelConfig
from openqwen.model import Packed
from openqwen.model.packed import FORMATS
from openqwen.model.quantize import QuantizedLinear, QuantizedQwen2

WIDTH, INSIDE, VOCABULARY = 896, 4_864, 151_936
SHAPES = {
    "qkv": (WIDTH, 1_152),
    "o": (WIDTH, WIDTH),
    "gate_up": (WIDTH, 2 * INSIDE),
    "down": (INSIDE, WIDTH),
}


def seconds(call: Callable[[], object], repeat: int = 5) -> float:
    """The median of a few runs, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def packed(inputs: int, outputs: int, kind: str) -> QuantizedLinear:
    """A matrix of random bytes with scales of about 0.01."""
    made = QuantizedLinear(inputs, {"all": outputs}, kind)
    made.packed.random_(0, 256)
    made.packed[:, :, :64] = torch.tensor([0.01]).bfloat16().view(torch.uint8).repeat(32)
    return made


def ceilings() -> tuple[float, float]:
    """GB/s and GFLOP/s."""
    memory, a = torch.ones(2**27), torch.ones(2_048, 2_048)
    read = memory.nbytes / seconds(lambda: memory.sum()) / 1e9
    return read, 2 * 2_048**3 / seconds(lambda: a @ a) / 1e9


def products(layers: int, read: float) -> None:
    """See the module."""
    for kind in FORMATS:
        for rows in (1, 4, 16, 64, 512):
            cells = []
            for name, (inputs, outputs) in {**SHAPES, "head": (WIDTH, VOCABULARY)}.items():
                copies = [
                    packed(inputs, outputs, kind)
                    for _ in range(layers if rows == 1 and name != "head" else 1)
                ]
                x = torch.randn(rows, inputs)
                took = seconds(lambda copies=copies, x=x: [matrix(x) for matrix in copies]) / len(
                    copies
                )
                rate = copies[0].packed.nbytes / took / 1e9
                cells.append(
                    f"{name} {rate:5.1f} GB/s {2 * rows * inputs * outputs / took / 1e9:6.0f} GOP/s"
                )
                if rows == 1:
                    cells[-1] += f" {rate / read:4.0%}"
            print(f"{kind} {rows:4} rows  " + "   ".join(cells), flush=True)


def forward(layers: int) -> None:
    """See the module."""
    config = ModelConfig(VOCABULARY, WIDTH, INSIDE, layers, 14, 2, tie_word_embeddings=True)
    for kind in FORMATS:
        model = QuantizedQwen2(config, kind).to_empty(device="cpu")
        for name, buffer in model.named_buffers():
            if name.endswith("packed"):
                buffer.random_(0, 256)[:, :, :64] = (
                    torch.tensor([0.01]).bfloat16().view(torch.uint8).repeat(32)
                )
            else:
                buffer.zero_()
        for parameter in model.parameters():
            parameter.data.fill_(1.0)

        def call(count: int, each: int, model: QuantizedQwen2 = model) -> None:
            attention = Packed.from_lengths([each] * count)
            hidden = model(torch.arange(count * each), attention.positions, attention)
            model.logits(hidden[each - 1 :: each])

        rates = [
            count * each / seconds(lambda c=count, e=each: call(c, e), 3)
            for count, each in ((1, 1_024), (16, 1))
        ]
        alone = 1 / seconds(lambda: call(1, 1))
        print(
            f"{kind}  prefill {rates[0]:.0f} tok/s  decode {alone:.1f} tok/s alone, "
            f"{rates[1]:.0f} in a batch of 16"
        )


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=["products", "forward"])
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        read, multiplied = ceilings()
        print(f"{threads} threads: memory {read:.1f} GB/s, float32 {multiplied:.0f} GFLOP/s")
        if "products" in options.only:
            products(options.layers, read)
        if "forward" in options.only:
            forward(options.layers)


if __name__ == "__main__":
    main()
