"""Check whether an upcycled model trains on from its parent's loss.

    python benchmarks/upcycle.py

A tiny dense model learns the source code of Python's standard library (about three minutes on one
core). Then every row of the table reads the same further tokens in the same order: the parent
itself, mixtures upcycled from it, and the same mixture from random weights. Losses are of held-out
files, in nats a token.
"""

import argparse
import random
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from openqwen.model import Qwen2, Routing, initialize, load_model
from openqwen.model.upcycle import Upcycling, redraw, upcycle, upcycled_config
from openqwen.support.generators import Generators
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.balance import balanced, with_loads
from openqwen.train.losses import Loss, next_token
from openqwen.train.optimizer import OptimizerConfig, adamw, learning_rate
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.packed_dataset import DataConfig, DocumentSampler, PackedDataset
from openqwen.train.pretrain import NetworkConfig, PretrainConfig, pretrain

CHECKS = (0, 20, 50, 100, 200)


class Documents:
    """Token ids of one source, held in memory."""

    def __init__(self, ids: list[np.ndarray]):
        self.ids = ids
        self.lengths = np.array([len(i) for i in ids])

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document."""
        return self.ids[number]


def read_library(megabytes: float) -> list[str]:
    """Files of the standard library, shuffled, up to this size."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [f for f in files if "site-packages" not in f.parts and "test" not in f.parts]
    random.Random(0).shuffle(files)
    texts: list[str] = []
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if 500 < len(text) < 60_000:
            texts.append(text)
            size += len(text)
        if size > megabytes * 1e6:
            break
    return texts


def held_out_loss(model: Qwen2, held_out: list[PackedBatch]) -> float:
    """Mean cross-entropy of the held-out tokens."""
    with torch.no_grad():
        losses = [next_token(model, rows) for rows in held_out]
    return sum(float(x.sum) for x in losses) / sum(x.count for x in losses)


def train_on(
    model: Qwen2,
    batch: Callable[[int], list[PackedBatch]],
    held_out: list[PackedBatch],
    rate: float,
    steps: int,
) -> list[float]:
    """Train with a constant learning rate; return the held-out loss at the steps of CHECKS."""
    config = OptimizerConfig(
        learning_rate=rate, schedule="constant", warmup_share=10 / steps, beta2=0.98
    )
    optimizer = adamw(model, config)
    sparse = bool(model.config.num_experts)
    found = []
    for step in range(steps + 1):
        if step in CHECKS:
            found.append(held_out_loss(model, held_out))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        count = 0
        for micro in with_loads(model, batch(step), "global" if sparse else "off"):

            def loss(rows: PackedBatch, routing: Routing) -> Loss:
                return next_token(model, rows, routing)

            one = (
                balanced(loss, micro, "global", 0.001) if sparse else next_token(model, micro.rows)
            )
            one.sum.backward()
            count += one.count
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that the parent learns from")
    parser.add_argument(
        "--parent", type=Path, help="folder that keeps the parent; one that is there is used again"
    )
    parser.add_argument("--rate", type=float, default=5e-4, help="of training on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = read_library(5.0)
    tokenizer = train_tokenizer(
        iter(texts[20:]), TokenizerConfig(vocabulary=2_048, max_bytes=2_000_000)
    )
    ids = [np.array([*tokenizer.encode(t), tokenizer.endoftext_id]) for t in texts]
    held_out = [PackedBatch.of([(i[:512], np.ones(len(i[:512]), dtype=bool))]) for i in ids[:20]]
    peak = 2e-3
    config = PretrainConfig(
        network=NetworkConfig(
            hidden_size=128, intermediate_size=352, layers=4, heads=4, kv_heads=2
        ),
        data=DataConfig(tokens=options.tokens, context=512, batch_tokens=1_024),
        train=OptimizerConfig(learning_rate=peak, beta2=0.98),
    )
    sources = {"library": Documents(ids[20:])}
    with tempfile.TemporaryDirectory() as folder:
        path = options.parent or Path(folder) / "dense"
        if not path.exists():
            work = Path(folder) / "work"
            pretrain(
                config, sources, tokenizer, tokenizer.vocab_size, None, path, work, 0, "parent"
            )
        parent = load_model(path)
    generators = Generators(1)
    further = PackedDataset(
        DocumentSampler(sources, generators),
        config.data.model_copy(update={"tokens": 225_000}),
        generators,
    )

    def batch(step: int) -> list[PackedBatch]:
        return [PackedBatch.of(samples) for samples in further.batch(step)]

    def scratch() -> Qwen2:
        model = Qwen2(upcycled_config(parent.config, Upcycling()))
        initialize(model, torch.Generator().manual_seed(0))
        return model

    rows: dict[str, tuple[Callable[[], Qwen2], float]] = {
        "the parent, trained on": (lambda: parent_copy(parent), options.rate),
        "upcycled (the default)": (lambda: upcycle(parent, Upcycling(), 0), options.rate),
        "upcycled, nothing drawn anew": (
            lambda: upcycle(parent, Upcycling(reinit=0.0), 0),
            options.rate,
        ),
        "upcycled, output not kept": (
            lambda: upcycle(parent, Upcycling(keep_output=False), 0),
            options.rate,
        ),
        "upcycled, output not kept, nothing drawn anew": (
            lambda: upcycle(parent, Upcycling(keep_output=False, reinit=0.0), 0),
            options.rate,
        ),
        f"the same mixture from random weights, at {peak:g}": (scratch, peak),
    }
    dense, sparse = parent.config, upcycled_config(parent.config, Upcycling())
    print(
        f"parent: {dense.parameters():,} parameters, held-out loss "
        f"{held_out_loss(parent, held_out):.3f}"
    )
    print(
        f"mixture: {sparse.parameters():,} parameters, {sparse.parameters(active=True):,} active; "
        f"{sparse.num_experts} experts of {sparse.moe_intermediate_size}, "
        f"{sparse.num_experts_per_tok} active, "
        f"shared {sparse.shared_expert_intermediate_size}, from {dense.intermediate_size}"
    )
    print_starts(parent, held_out)
    print("| held-out loss after this many steps | " + " | ".join(map(str, CHECKS)) + " |")
    print("|---|" + "---|" * len(CHECKS))
    for name, (make, rate) in rows.items():
        found = train_on(make(), batch, held_out, rate, max(CHECKS))
        print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in found) + " |", flush=True)


@torch.no_grad()
def print_starts(parent: Qwen2, held_out: list[PackedBatch]) -> None:
    """Where the choices that the report leaves open put the first loss."""
    half, none = parent_copy(parent), parent_copy(parent)
    for layer, empty in zip(half.model.layers, none.model.layers, strict=True):
        layer.mlp.down_proj.weight.mul_(0.5)
        empty.mlp.down_proj.weight.zero_()
    gated, redrawn = upcycle(parent, Upcycling(), 0), upcycle(parent, Upcycling(), 0)
    generator = torch.Generator().manual_seed(0)
    for layer, other in zip(gated.model.layers, redrawn.model.layers, strict=True):
        layer.mlp.shared_expert_gate.weight.normal_(0.0, 0.02, generator=generator)
        shared = other.mlp.shared_expert
        parts = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T]
        redraw([part[None] for part in parts], 0.5, generator)
    starts = {
        "the parent": parent,
        "its feed-forward networks at half": half,
        "without them": none,
        "upcycled (the default)": upcycle(parent, Upcycling(), 0),
        "nothing drawn anew": upcycle(parent, Upcycling(reinit=0.0), 0),
        "output not kept": upcycle(parent, Upcycling(keep_output=False), 0),
        "the shared expert's gate ~ N(0, 0.02) instead of 0": gated,
        "the shared expert drawn anew like the others": redrawn,
    }
    print("| loss before training | |\n|---|---|")
    for name, model in starts.items():
        print(f"| {name} | {held_out_loss(model, held_out):.3f} |", flush=True)


def parent_copy(parent: Qwen2) -> Qwen2:
    """The parent with weights of its own."""
    model = Qwen2(parent.config)
    model.load_state_dict(parent.state_dict())
    return model


if __name__ == "__main__":
    main()
