"""Speed and memory of DPO and of a GRPO step beside TRL's, on one model and one set of prompts.

    python benchmarks/bench_align.py --data gsm8k_train.jsonl.gz --model MODEL --peer PYTHON

MODEL is a folder or a .gguf file; the peer gets it as a float32 checkpoint. PYTHON is the one of an
environment with TRL (benchmarks/requirements-sft.txt). Both sides update all weights with AdamW and
run in turn, each in a process of its own; the peer in float32 and in bfloat16, of which the better
one is compared. The peer's side is `peer_align.py`.

DPO: pairs of GSM8K solutions, of which the rejected one is the next problem's. Useful tokens are
those of each prompt with each of its answers; padding is not counted. The reference's
log-probabilities count in the time. GRPO: a step samples 8 answers of 64 tokens to 2 prompts,
scores them by a function, and updates once, with β 0.001 and the loss of the GRPO paper.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import tyro
from bench_train import HUGE_PAGES
from rich.table import Table

from openqwen.model import load_model, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl, write_json, write_jsonl
from openqwen.support.progress import console
from openqwen.support.records import Record
from openqwen.tasks import read_problems
from openqwen.tokenizer import load_tokenizer
from openqwen.train import dpo as dpo_stage
from openqwen.train.dpo import DpoConfig
from openqwen.train.grpo import GrpoConfig, GrpoTraining
from openqwen.train.metrics import METRICS
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.rollouts import RolloutGroup
from openqwen.train.trainer import Place, SaveConfig

_PEER = Path(__file__).with_name("peer_align.py")
_SAMPLES, _ANSWER, _PROMPTS, _RATE = 8, 64, 2, 1e-6
# What is wanted of ours over the peer's better run: speed from, speed hoped for, memory at most.
_GOALS = {"dpo": "2.5 to 4 ×, memory at most 0.8 ×", "grpo": "4 to 8 ×"}


def bench(
    data: Path,
    model: Path,
    peer: str | None = None,
    kinds: tuple[str, ...] = ("dpo", "grpo"),
    pairs: int = 2,
    steps: int = 4,
    precision: str = "float32",
    sampler: str = "none",
) -> None:
    """Print the speed and the peak memory of both sides.

    Args:
        data: GSM8K, as its authors published it.
        model: The checkpoint that both sides train.
        peer: The Python that has TRL; without it only OpenQwen is measured.
        kinds: Of the steps to measure: dpo, grpo.
        pairs: Pairs of a DPO step.
        steps: Steps of a run; the first is not counted.
        precision: Of OpenQwen's products in training.
        sampler: OpenQwen's weights while it samples: none (float32) or int8. The loss corrects for
            the difference.
    """
    with tempfile.TemporaryDirectory(prefix="openqwen-bench-") as name:
        folder = Path(name)
        checkpoint = _checkpoint(model, folder)
        _write_rows(data, folder, max(pairs, _PROMPTS) * steps)
        for kind in kinds:
            job = {"kind": kind, "model": str(checkpoint), "folder": name, "steps": steps}
            job |= {"batch": pairs if kind == "dpo" else _PROMPTS, "rate": _RATE}
            job |= {"samples": _SAMPLES, "answer": _ANSWER, "sampler": sampler}
            sides = [("OpenQwen", [sys.executable, __file__], precision)]
            if peer:
                sides += [(f"TRL, {p}", [peer, str(_PEER)], p) for p in ("float32", "bfloat16")]
            found = {}
            for side, command, numbers in sides:
                write_json(folder / "job.json", job | {"precision": numbers})
                found[side] = _run(command, folder, side != "OpenQwen")
            console.print(_table(kind, found, job))


def _checkpoint(model: Path, folder: Path) -> Path:
    """A folder with float32 weights, which both sides can read."""
    if model.is_dir():
        return model
    target = folder / "model"
    save_checkpoint(load_model(model, dtype="float32"), load_tokenizer(model), target, chat=True)
    return target


def _write_rows(data: Path, folder: Path, count: int) -> None:
    """Preference pairs of the first problems, in the conversational form."""
    problems = list(islice(read_problems("gsm8k", data), count + 1))
    if len(problems) <= count:
        what = f"{count + 1} problems are needed; there are {len(problems)}."
        raise OpenQwenError(what, where=data, do="give fewer --steps")
    solutions = [row["answer"] for row in islice(read_jsonl(data), count + 1)]
    # Templates add one of their own where there is none.
    system = {"role": "system", "content": "You are a helpful assistant."}
    says = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [
        {"prompt": [system, *task.prompt], "chosen": says(right), "rejected": says(wrong)}
        for task, right, wrong in zip(problems, solutions, solutions[1:])
    ]
    write_jsonl(folder / "rows.jsonl", rows)


def _run(command: list[str], folder: Path, is_peer: bool) -> dict[str, float]:
    environment = dict(os.environ)
    if is_peer:  # importing our package sets the latter
        environment = {k: v for k, v in environment.items() if k not in ("PYTHONPATH", HUGE_PAGES)}
    done = subprocess.run(
        [*command, str(folder / "job.json")], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        text = (done.stdout + done.stderr)[-2_000:]
        raise OpenQwenError(f"{command[0]} failed: {text}", where=" ".join(command))
    return json.loads(done.stdout.strip().split("\n")[-1])


def _table(kind: str, found: dict[str, dict[str, float]], job: dict[str, Any]) -> Table:
    """Seconds a step, useful tokens/s and memory of each side, and the ratios to the better peer."""
    title = f"{kind}: {job['batch']} {'pairs' if kind == 'dpo' else 'prompts × 8 answers'} a step"
    table = Table("", "seconds a step", "useful tokens/s", "peak memory", title=title, box=None)
    for side, one in found.items():
        speed = f"{one['tokens'] / one['seconds']:,.1f}"
        memory = f"{one['memory'] / 2**30:.2f} GiB"
        table.add_row(side, f"{one['seconds']:.2f}", speed, memory)
    peers = [one for side, one in found.items() if side != "OpenQwen"]
    if peers:
        ours, best = found["OpenQwen"], max(peers, key=lambda one: one["tokens"] / one["seconds"])
        ratio = ours["tokens"] / ours["seconds"] * best["seconds"] / best["tokens"]
        table.add_row("ratio", "", f"{ratio:.2f}×", f"{ours['memory'] / best['memory']:.2f}×")
        table.add_row("wanted", "", _GOALS[kind], "")
    return table


def letters(records: list[Record], answers: list[str]) -> list[float]:
    """The reward of GRPO's steps: something that differs between answers, at no cost."""
    return [sum(letter in "aeiou" for letter in answer) / 64 for answer in answers]


class _Clock:
    """Adds up the seconds of a function's calls, each the second of two.

    The first one also reads the weights from the file, once for a whole training.
    """

    def __init__(self, call: Callable[..., Any]):
        self.call, self.seconds = call, 0.0

    def __call__(self, *given: Any) -> Any:
        self.call(*given)
        start = time.perf_counter()
        result = self.call(*given)
        self.seconds += time.perf_counter() - start
        return result


class _CountedGrpo(GrpoTraining):
    """GRPO that counts the tokens of prompts and answers."""

    tokens: list[int]

    def note(self, episode: int, groups: list[RolloutGroup]) -> None:  # type: ignore[override]
        """See `OnlineTraining.note`."""
        super().note(episode, groups)
        size = lambda output: len(output.prompt_ids) + len(output.token_ids)  # noqa: E731
        self.tokens.append(sum(size(output) for group in groups for output in group.outputs))


def ours(job: dict[str, Any]) -> dict[str, float]:
    """Run OpenQwen's side of a job in this process; medians of the steps after the first."""
    folder, start = Path(job["folder"]), Path(job["model"])
    optimizer = OptimizerConfig(
        learning_rate=job["rate"], precision=job["precision"], weight_decay=0
    )
    common: dict[str, Any] = {"train": optimizer, "save": SaveConfig(seconds=1e9)}
    tokenizer, rows = load_tokenizer(start), folder / "rows.jsonl"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Place(Path(name) / "output", Path(name) / "scratch", 0, job["kind"])
        before = 0.0
        if job["kind"] == "dpo":
            count = job["batch"] * job["steps"]
            used = Path(name) / "pairs.jsonl"
            write_jsonl(used, islice(read_jsonl(rows), count))
            clock = _Clock(dpo_stage.reference_log_probs)
            dpo_stage.reference_log_probs = clock
            config = DpoConfig(epochs=1, batch=job["batch"], **common)
            dpo_stage.dpo(config, start, used, tokenizer, place)
            before = clock.seconds / job["steps"]
            tokens = [_pair_tokens(tokenizer, row) * job["batch"] for row in read_jsonl(used)]
        else:
            sys.path.insert(0, str(Path(__file__).parent))
            os.chdir(Path(__file__).parent)  # where the reward's module is
            rewards = {"sources": ["bench_align:letters"]}
            sizes = {"batch": job["batch"], "samples": job["samples"], "max_tokens": job["answer"]}
            config = GrpoConfig(
                episodes=job["steps"],
                order="shuffle",
                beta=1e-3,
                rewards=rewards,
                sampler={"quantize": job["sampler"]},
                **sizes,
                **common,
            )
            training = _CountedGrpo(config, start, rows, tokenizer, place, None)
            training.tokens = []
            training.run(job["steps"])
            tokens = training.tokens
        log = list(read_jsonl(place.output / METRICS))
    return {
        "seconds": statistics.median(entry["seconds"] for entry in log[1:]) + before,
        "tokens": statistics.mean(tokens),
        "memory": log[-1]["peak_memory"],
    }


def _pair_tokens(tokenizer: Any, row: Record) -> int:
    """Tokens of a prompt with its chosen answer, and with its rejected one."""
    talks = ([*row["prompt"], *row[side]] for side in ("chosen", "rejected"))
    return sum(len(tokenizer.encode_chat(talk)[0]) for talk in talks)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):  # called by `_run`
        print("\n" + json.dumps(ours(read_json(Path(sys.argv[1])))))
    else:
        tyro.cli(bench)
