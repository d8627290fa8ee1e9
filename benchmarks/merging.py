"""Time and memory of an Online Merging step against AdamW's, on a network's shapes.

    python benchmarks/merging.py --layers 8 --vocabulary 151936

Both optimizers change the same weights by the same fresh random gradients, in turns; the medians of
their processor times are compared, which a loaded machine changes little. No network is run. Memory
counts moments and what merging adds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from openqwen.model import ModelConfig, Qwen2
from openqwen.train.merging import OnlineMerging

WARM = 10  # steps before those that are measured
CASES: dict[str, dict[str, Any]] = {
    "OnDARE, p 0.01": {"form": "dare", "reserve": 0.01},
    "OnDARE, p 0.01, unscaled": {"form": "dare", "reserve": 0.01, "scaling": "none"},
    "OnTIES, p 0.01": {"form": "ties", "reserve": 0.01},
    "OnTIES, p 0.01, unweighted": {"form": "ties", "reserve": 0.01, "signs": "unweighted"},
    "OnDARE, p 0.0005": {"form": "dare", "reserve": 5e-4},
    "OnTIES, p 0.2": {"form": "ties", "reserve": 0.2},
    "OnDARE, p 1": {"form": "dare", "reserve": 1.0},
    "OnDARE, p 1, bfloat16": {"form": "dare", "reserve": 1.0, "store": torch.bfloat16},
    "OnDARE, p 0.01, every 5": {"form": "dare", "reserve": 0.01, "every": 5},
}


def timed(step: Callable[[], Any]) -> float:
    """Seconds of processor time of one call, of all threads together."""
    start = time.process_time()
    step()
    return time.process_time() - start


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all that an optimizer holds beside weights and gradients."""
    total = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    for part in getattr(optimizer, "_parts", {}).values():
        total += sum(t.nbytes for t in vars(part.task).values() if t is not None)
    return total


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=4_096, help="rows of the embedding")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--decay", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = replace(ModelConfig.named(options.model), num_hidden_layers=options.layers)
    config = replace(config, vocab_size=options.vocabulary)
    with torch.device("meta"):
        model = Qwen2(config)
    names, weights = [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        weights.append(torch.empty(parameter.shape).normal_(0, 0.02).requires_grad_())
        weights[-1].grad = torch.empty(parameter.shape)
    count = sum(weight.numel() for weight in weights)
    print(f"{count:,} weights, {options.threads} threads, weight decay {options.decay}")
    settings = {"lr": 7e-7, "betas": (0.9, 0.95), "weight_decay": options.decay}
    adamw = torch.optim.AdamW(weights, fused=True, **settings)
    for case in options.cases:
        merging = OnlineMerging(
            zip(names, weights),
            (weight.detach() for weight in weights),
            (w.detach() + 1e-3 * torch.randn_like(w) for w in weights),
            **settings,
            **CASES[case],
        )
        seconds: dict[str, list[float]] = {"adamw": [], "merging": []}
        for number in range(WARM + options.steps):
            for weight in weights:
                weight.grad.normal_()
            for name, optimizer in (("adamw", adamw), ("merging", merging)):
                spent = timed(optimizer.step)
                if number >= WARM:  # the first steps allocate, and AdamW's sizes change much
                    seconds[name].append(spent)
        ours, theirs = (statistics.median(seconds[name]) for name in ("merging", "adamw"))
        held = [state_bytes(optimizer) / count for optimizer in (adamw, merging)]
        print(
            f"{case}: {ours:.3f} s, AdamW {theirs:.3f} s, ratio {ours / theirs:.2f};"
            f" {held[1]:.2f} bytes a weight, AdamW {held[0]:.2f}",
            flush=True,
        )
        del merging


if __name__ == "__main__":
    main()
