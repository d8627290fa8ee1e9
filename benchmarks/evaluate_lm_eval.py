"""Speed and scores of our engine under lm-evaluation-harness, against its transformers backend.

Runs in the harness's own environment, with this package on its path:

    python3 -m venv peers/lm-eval
    peers/lm-eval/bin/pip install torch==2.13.0 transformers lm-eval==0.4.13 accelerate
    PYTHONPATH=src peers/lm-eval/bin/python benchmarks/evaluate_lm_eval.py --model FOLDER \
        --questions gsm8k_train.jsonl.gz

Three tasks are made from the questions of GSM8K: multiple choice with five solved examples (the
log-likelihoods of four numbers), rolling log-likelihood of the solutions, and greedy answers. Both
backends get the same requests, one after the other in turns; times are medians of the rounds. The
transformers backend finds its own batch size (`--batch auto`), or takes the one that is given.

Log-likelihoods must agree within 1e-4 (relative for rolling ones); with float32 weights greedy
answers must be the same but where two tokens are nearly equally likely: the share is printed.
`--quantize int8` stores our weights in 8 bits and says how far the scores then are.
"""

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from openqwen.evaluate.lm_eval import EngineLM
from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

SHOTS, OPTIONS = 5, 4
TOLERANCE = 1e-4


def records(path: Path, count: int) -> list[dict[str, str]]:
    """The first records of GSM8K's file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file)]


def solved(record: dict[str, str]) -> str:
    """A question with its number."""
    return (
        f"Question: {record['question']}\nAnswer: {record['answer'].rpartition('####')[2].strip()}"
    )


def likelihood_requests(rows: list[dict[str, str]]) -> list[Instance]:
    """Four numbers after each question, behind the same solved examples."""
    head = "\n\n".join(map(solved, rows[:SHOTS])) + "\n\n"
    requests = []
    for index, row in enumerate(rows[SHOTS:]):
        number = row["answer"].rpartition("####")[2].strip()
        options = [number, f"{number}0", f"1{number}", "no"]
        context = f"{head}Question: {row['question']}\nAnswer:"
        for place, option in enumerate(options[:OPTIONS]):
            given = (context, f" {option}")
            requests.append(Instance("loglikelihood", {}, given, place, ("pick", index, 1)))
    return requests


def rolling_requests(rows: list[dict[str, str]]) -> list[Instance]:
    """Whole solutions."""
    return [
        Instance("loglikelihood_rolling", {}, (row["answer"],), 0, ("roll", index, 1))
        for index, row in enumerate(rows)
    ]


def generation_requests(rows: list[dict[str, str]], tokens: int) -> list[Instance]:
    """Greedy answers to questions."""
    settings = {"until": ["\n\n"], "max_gen_toks": tokens, "do_sample": False}
    return [
        Instance("generate_until", {}, (f"Question: {row['question']}\nAnswer:", settings), 0,
                 ("write", index, 1))
        for index, row in enumerate(rows)
    ]  # fmt: skip


def tiny_model(folder: Path) -> None:
    """A random model of three layers, for a try of this script."""
    tokenizer = train_tokenizer(["one two three four five"] * 20, TokenizerConfig(vocabulary=300))
    rows = tokenizer.vocab_size  # no row without a token: the engine never writes such ids
    model = Qwen2(ModelConfig(rows, 64, 96, 3, 4, 2, max_position_embeddings=8192))
    initialize(model, torch.Generator().manual_seed(0))
    save_checkpoint(model, tokenizer, folder)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, Any]]:
    """The median seconds of each call and its last result; the order changes with each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            spent, results[name] = timed(calls[name])
            seconds[name].append(spent)
    return {name: (statistics.median(seconds[name]), results[name]) for name in calls}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a tiny one")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's JSON Lines")
    parser.add_argument("--count", type=int, default=40, help="questions of each task")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="auto", help="batch size of the transformers backend")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.model or Path(scratch)
        if given.model is None:
            tiny_model(folder)
        rows = records(given.questions, given.count + SHOTS)
        measure(given, folder, rows)


def measure(given: argparse.Namespace, folder: Path, rows: list[dict[str, str]]) -> None:
    """All three tasks, and a line for each."""
    batch = given.batch if given.batch == "auto" else int(given.batch)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch)

    engine = EngineLM(str(folder), quantize=given.quantize)

    def ours() -> EngineLM:
        engine.engine.refresh()  # drops the prefixes of an earlier round
        return engine

    requests = likelihood_requests(rows)
    found = in_turns(
        {
            "ours": lambda: ours().loglikelihood(requests),
            "theirs": lambda: theirs.loglikelihood(requests, disable_tqdm=True),
        },
        given.rounds,
    )
    pairs = list(zip(found["ours"][1], found["theirs"][1], strict=True))
    gap = max(abs(a[0] - b[0]) for a, b in pairs)
    same = sum(a[1] == b[1] for a, b in pairs) / len(pairs)
    report("log-likelihood", found, f"largest difference {gap:.2e}, greedy flags equal {same:.1%}")

    requests = rolling_requests(rows)
    rolling = in_turns(
        {
            "ours": lambda: ours().loglikelihood_rolling(requests),
            "theirs": lambda: theirs.loglikelihood_rolling(requests, disable_tqdm=True),
        },
        given.rounds,
    )
    pairs = list(zip(rolling["ours"][1], rolling["theirs"][1], strict=True))
    relative = max(abs(a - b) / abs(b) for a, b in pairs)
    report("rolling", rolling, f"largest relative difference {relative:.2e}")

    requests = generation_requests(rows[SHOTS:], given.tokens)
    written = in_turns(
        {
            "ours": lambda: ours().generate_until(requests),
            "theirs": lambda: theirs.generate_until(requests, disable_tqdm=True),
        },
        given.rounds,
    )
    pairs = list(zip(written["ours"][1], written["theirs"][1], strict=True))
    other = [pair for pair in pairs if pair[0] != pair[1]]
    report("generation", written, f"equal answers {len(pairs) - len(other)} of {len(pairs)}")
    if other:
        print(f"{'':<15} the first that differ: ours {other[0][0]!r}, theirs {other[0][1]!r}")
    if given.quantize is None and max(gap, relative) > TOLERANCE:
        raise SystemExit(f"the scores differ by more than {TOLERANCE}")


def report(task: str, found: dict[str, tuple[float, Any]], note: str) -> None:
    """One line."""
    (ours, _), (theirs, _) = found["ours"], found["theirs"]
    print(f"{task:<15} ours {ours:8.2f} s  theirs {theirs:8.2f} s  {theirs / ours:5.2f} ×  {note}")


if __name__ == "__main__":
    main()
