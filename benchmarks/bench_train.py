"""Training speed: SFT beside TRL's SFTTrainer, pre-training beside transformers' Trainer.

    python benchmarks/bench_train.py --kind sft --data gsm8k_train.jsonl.gz --model MODEL --peer PYTHON

Both sides see the same examples in the same batches, update all weights in float32 with AdamW and
gradient clipping, and run in turn, each in a process of its own. Useful tokens are those of the
examples; padding is not counted. The peer's side is `peer_training.py`, which runs under the peer's
Python.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.batching import cut_to_budget
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl, write_json
from openqwen.support.generators import Generators
from openqwen.support.progress import console
from openqwen.support.records import read_records
from openqwen.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from openqwen.tokenizer.messages import demonstration
from openqwen.train.losses import next_token
from openqwen.train.metrics import METRICS
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.recompute import Recompute
from openqwen.train.sft import SftConfig, sft
from openqwen.train.trainer import Place, SaveConfig, Trainer, TrainingConfig

Kind = Literal["sft", "pretrain"]
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
_PEER = Path(__file__).with_name("peer_training.py")
# The ratios to the peer that are wanted: least speed, hoped-for speed, most memory.
_GOALS = {"sft": (2.0, 3.5, 0.8), "pretrain": (1.5, 2.5, math.inf)}
_CONTEXT, _RATE = 1_024, 1e-5
SMALL = {  # 31 million parameters with a vocabulary of 16,384
    "hidden_size": 512,
    "intermediate_size": 1_408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": _CONTEXT,
    "tie_word_embeddings": True,
}


def bench(
    kind: Kind,
    data: Path,
    model: Path | None = None,
    peer: str | None = None,
    batch: int | None = None,
    steps: int = 4,
    repeats: int = 1,
    recompute: Recompute = "nothing",
) -> None:
    """Print tokens/s, the share of this machine's matrix peak, and the peak memory of training.

    Args:
        kind: sft: fine-tune `model` on demonstrations; pretrain: train a new network.
        data: sft: demonstrations, such as GSM8K's; pretrain: JSON Lines with a field `text`.
        model: sft: the folder of a float32 checkpoint.
        peer: The Python that has TRL (sft) or transformers and accelerate (pretrain);
            without it only OpenQwen is measured.
        batch: Examples of a step; 4 for sft, 16 for pretrain.
        steps: Steps of a run; the first is not counted.
        repeats: Runs of each side, in turn; medians are printed.
        recompute: Activations that OpenQwen computes again in the backward pass.
    """
    if kind == "sft" and model is None:
        raise OpenQwenError(
            "No model is given to fine-tune.", where="--model", do="give the folder of a checkpoint"
        )
    runs: dict[str, list[dict[str, float]]] = {"OpenQwen": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix="openqwen-bench-") as name:
        job = {
            "kind": kind,
            "model": str(model),
            "batch": batch or {"sft": 4, "pretrain": 16}[kind],
            "steps": steps,
        }
        job |= {"folder": name, "rate": _RATE, "context": _CONTEXT, "recompute": recompute}
        _prepare(job, data)
        write_json(Path(name) / "job.json", job)
        for _ in range(repeats):
            runs["OpenQwen"].append(_run([sys.executable, __file__], name, dict(os.environ)))
            if peer:
                without = {"PYTHONPATH", HUGE_PAGES}  # importing us sets the latter
                environment = {
                    key: value for key, value in os.environ.items() if key not in without
                }
                runs["peer"].append(_run([peer, str(_PEER)], name, environment))
    console.print(_table(kind, runs, job))


def _prepare(job: dict[str, Any], data: Path) -> None:
    """Write what both sides read: conversations, or token ids and a network's configuration."""
    folder, count = Path(job["folder"]), job["batch"] * job["steps"]
    if job["kind"] == "sft":
        rows = [{"messages": demonstration(row)[0]} for _, row in islice(read_records(data), count)]
        (folder / "rows.jsonl").write_text(
            "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"
        )
        return
    texts = [row["text"] for row in islice(read_jsonl(data), 50 * count) if row["text"].strip()]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=16_384, max_bytes=20_000_000))
    ids = list(islice(_pieces(tokenizer, texts), count))
    if len(ids) < count:
        raise OpenQwenError(
            f"{count} examples are needed; there are {len(ids)}.",
            where=data,
            do="give fewer --steps",
        )
    write_json(folder / "rows.json", ids)
    write_json(
        folder / "config.json", SMALL | {"vocab_size": -(-tokenizer.vocab_size // 128) * 128}
    )


def _pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the token ids of each document, cut to the context length."""
    for text in texts:
        ids = [*tokenizer.encode(text[: 16 * _CONTEXT]), tokenizer.eos_id][: _CONTEXT + 1]
        if len(ids) > 1:
            yield ids


def _run(command: list[str], folder: str, environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [*command, f"{folder}/job.json"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise OpenQwenError(
            f"{command[0]} failed: {(done.stdout + done.stderr)[-2_000:]}", where=" ".join(command)
        )
    return json.loads(done.stdout.strip().split("\n")[-1])


def _table(kind: Kind, runs: dict[str, list[dict[str, float]]], job: dict[str, Any]) -> Table:
    counted = f"medians of {len(runs['OpenQwen'])} × {job['steps'] - 1} steps"
    what = f"{kind}, float32, {job['batch']} examples a step, {counted}"
    table = Table(
        "",
        "useful tokens/s",
        "of matrix peak",
        "peak memory",
        title=what,
        box=None,
        title_justify="left",
    )
    middle: dict[str, dict[str, float]] = {}
    for side, found in runs.items():
        if found:
            middle[side] = {key: statistics.median(run[key] for run in found) for key in found[0]}
            share = f"{middle[side]['share']:.0%}" if "share" in middle[side] else "not measured"
            table.add_row(
                side,
                f"{middle[side]['speed']:,.1f}",
                share,
                f"{middle[side]['memory'] / 2**30:.2f} GiB",
            )
    if "peer" in middle:
        pairs = list(zip(runs["OpenQwen"], runs["peer"], strict=True))
        speed, memory = (
            statistics.median(a[key] / b[key] for a, b in pairs) for key in ("speed", "memory")
        )
        floor, aim, most = _GOALS[kind]
        table.add_row("ratio", f"{speed:.2f}×", "", f"{memory:.2f}×")
        table.add_row(
            "wanted", f"{floor} to {aim}×", "", "" if math.isinf(most) else f"at most {most}×"
        )
    return table


def ours(job: dict[str, Any]) -> dict[str, float]:
    """Run OpenQwen's side of a job in this process."""
    folder = Path(job["folder"])
    optimizer = OptimizerConfig(
        learning_rate=job["rate"], recompute=job["recompute"], precision="float32"
    )
    common: dict[str, Any] = {"train": optimizer, "save": SaveConfig(seconds=1e9)}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Place(Path(name) / "output", Path(name) / "scratch", 0, job["kind"])
        if job["kind"] == "sft":
            config = SftConfig(epochs=1, batch=job["batch"], max_length=_CONTEXT, **common)
            start = Path(job["model"])
            sft(config, start, folder / "rows.jsonl", load_tokenizer(start), place)
        else:
            _pretrain(job, TrainingConfig(**common), place)
        log = list(read_jsonl(place.output / METRICS))
    found = {"speed": "tokens_per_second", "share": "mfu"}
    medians = {
        key: statistics.median(entry[name] for entry in log[1:]) for key, name in found.items()
    }
    return medians | {"memory": log[-1]["peak_memory"]}


def _pretrain(job: dict[str, Any], settings: TrainingConfig, place: Place) -> None:
    folder, size = Path(job["folder"]), job["batch"]
    ids = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    config = ModelConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model, generators = Qwen2(config).to(best_device()), Generators(0)
    initialize(model, generators.torch("weights"))

    def batch(step: int) -> list[PackedBatch]:
        chosen = [(row, [1] * len(row)) for row in ids[step * size : (step + 1) * size]]
        return [
            PackedBatch.of(chosen[cut], model.device)
            for cut in cut_to_budget([len(r) for r, _ in chosen], 8_192)
        ]

    loss = lambda rows: next_token(model, rows)  # noqa: E731
    Trainer(place, settings, model, batch, loss, job["steps"], generators, log_mfu=True).run()


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):  # called by `_run`
        print("\n" + json.dumps(ours(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
    else:
        tyro.cli(bench)
