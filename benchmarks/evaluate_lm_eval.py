"""Speed and scores of our engine under lm-evaluation-harness, against its transformers backend.

Runs in the harness's own environment, with this package on its path:

    python3 -m venv peers/lm-eval
    peers/lm-eval/bin/pip install torch==2.13.0 transformers lm-eval==0.4.13 accelerate
    openqwen convert MODEL.gguf FOLDER          # both sides read these weights, in float32
    PYTHONPATH=src peers/lm-eval/bin/python benchmarks/evaluate_lm_eval.py --model FOLDER \
        --questions gsm8k_train.jsonl.gz

The harness makes the requests, counts the scores and is not timed; only the backend's methods are.
Four tasks in its own form are made from GSM8K's training file, with the shots as the harness draws
them for the tasks they stand for:

    letters   five shots, the same for all questions, and the letter of one of four solutions (MMLU)
    endings   five shots drawn for each question, and one of four solutions as a text (ARC)
    rolling   the log-likelihood of solutions as whole texts (WikiText)
    gsm8k     the harness's own GSM8K: five shots drawn for each question, a greedy answer

Log-likelihoods are in float32 on both sides: the scores must agree to 1e-4, and each request's
log-likelihood to 1e-4 of its size. Generation: our weights are in int8, the other side has
whichever of float32 and bfloat16 answers four questions faster. The transformers backend is also
timed in bfloat16 on log-likelihoods, where its scores are no longer equal.

A ratio is the transformers backend's median time by ours. `--rounds` is for our side; the other
side, which is slow, is measured once, or as often as `--their-rounds` says. The harness's own
`--batch_size auto` begins with 64 rows of the whole context and needs more memory than a CPU has.
"""

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from openqwen.evaluate.lm_eval import EngineLM
from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

SHOTS, OPTIONS = 5, 4
TOLERANCE = 1e-4
METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
LIKELIHOODS = ("letters", "endings", "rolling")
PROBED = 4  # questions by which a precision is chosen
FORMS: dict[str, dict[str, Any]] = {
    "letters": {
        "output_type": "multiple_choice",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "{{question}}\nA. {{texts[0]}}\nB. {{texts[1]}}\nC. {{texts[2]}}\n"
        "D. {{texts[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "place",
        "metric_list": [{"metric": "acc"}],
    },
    "endings": {
        "output_type": "multiple_choice",
        "num_fewshot": SHOTS,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "texts",
        "doc_to_target": "place",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "gsm8k": {
        "output_type": "generate_until",
        "num_fewshot": SHOTS,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "ignore_case": True,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "filter_list": [
            {
                "name": "flexible",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                    },
                    {"function": "take_first"},
                ],
            }
        ],
    },
}


@dataclass
class Backend:
    """A model of the harness that counts the seconds in its methods."""

    name: str
    model: LM
    seconds: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method in METHODS:
            setattr(self.model, method, self._timed(getattr(self.model, method)))

    def _timed(self, method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = method(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return found

        return run

    def evaluate(self, task: "Task", rounds: int = 1) -> float:
        """Run a task; the median of its times so far."""
        for _ in range(rounds):
            if isinstance(self.model, EngineLM):
                self.model.engine.refresh()  # drops the prefixes of an earlier round
            self.seconds = 0.0
            self.results[task.name] = simple_evaluate(
                self.model,
                tasks=[dict(task.form)],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
            )
            self.times.setdefault(task.name, []).append(self.seconds)
        return statistics.median(self.times[task.name])

    def scores(self, task: str) -> str:
        """The scores of a task as a text."""
        return ", ".join(f"{key} {value:.4g}" for key, value in self._scores(task).items())

    def numbers(self, task: str) -> list[float]:
        """The scores of a task."""
        return list(self._scores(task).values())

    def _scores(self, task: str) -> dict[str, float]:
        found = self.results[task]["results"][task]
        return {
            key.partition(",")[0]: value
            for key, value in found.items()
            if isinstance(value, float) and "stderr" not in key
        }

    def values(self, task: str) -> list[Any]:
        """What the model gave to each request of a task, in order."""
        samples = sorted(self.results[task]["samples"][task], key=lambda one: one["doc_id"])
        return [part[0] for sample in samples for part in sample["resps"]]


@dataclass(frozen=True)
class Task:
    """A task in the harness's form, with its data in a file of its own."""

    name: str
    form: dict[str, Any]


def make_task(name: str, rows: list[dict[str, Any]], tokens: int, folder: Path) -> Task:
    """The first rows are the examples, the others the questions."""
    kind = name.partition("-")[0]
    files = {}
    for part, chosen in (("shots", rows[: 4 * SHOTS]), ("test", rows[4 * SHOTS :])):
        path = folder / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        files[part] = str(path)
    form = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    form |= {"test_split": "test", "fewshot_split": "shots", **FORMS[kind]}
    if kind == "gsm8k":
        form["generation_kwargs"] = form["generation_kwargs"] | {"max_gen_toks": tokens}
    return Task(name, form)


def read_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """GSM8K's records, each with the first lines of four solutions, of which its own is one."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(4 * SHOTS + count), file)]
    draw = random.Random(0)
    for number, row in enumerate(rows):
        others = draw.sample([i for i in range(len(rows)) if i != number], OPTIONS - 1)
        texts = [rows[i]["answer"].partition("\n")[0] for i in (number, *others)]
        order = draw.sample(range(OPTIONS), OPTIONS)
        row |= {"texts": [texts[i] for i in order], "place": order.index(0)}
    return rows


def tiny_model(folder: Path) -> None:
    """A random model of three layers, for a try of this script."""
    tokenizer = train_tokenizer(["one two three four five"] * 20, TokenizerConfig(vocabulary=300))
    rows = tokenizer.vocab_size  # no row without a token: the engine never writes such ids
    model = Qwen2(ModelConfig(rows, 64, 96, 3, 4, 2, max_position_embeddings=8192))
    initialize(model, torch.Generator().manual_seed(0))
    save_checkpoint(model, tokenizer, folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: a tiny one")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's training file")
    parser.add_argument("--choices", type=int, default=6, help="questions with four options")
    parser.add_argument("--texts", type=int, default=12, help="texts of the rolling task")
    parser.add_argument("--answers", type=int, default=24, help="questions to answer")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours")
    parser.add_argument("--their-rounds", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4],
                        help="theirs, of log-likelihoods; the fastest is taken")  # fmt: skip
    parser.add_argument("--answer-batch", type=int, default=24, help="theirs, of answers")
    parser.add_argument("--parts", nargs="+", choices=["likelihoods", "answers"],
                        default=["likelihoods", "answers"])  # fmt: skip
    parser.add_argument("--quantize", choices=["int8", "int4"], default="int8",
                        help="our weights for answers")  # fmt: skip
    given = parser.parse_args()
    with scratch_folder(given.model) as (scratch, folder):
        measure(given, folder, scratch)


@contextmanager
def scratch_folder(model: Path | None) -> Iterator[tuple[Path, Path]]:
    """A folder for files, and the model's."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if model is None:
            tiny_model(scratch / "tiny")
        yield scratch, model or scratch / "tiny"


def measure(given: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """All tasks, a line for each, and the two sums."""
    started = time.monotonic()
    counts = {"letters": given.choices, "endings": given.choices}
    counts |= {"rolling": given.texts, "gsm8k": given.answers}
    rows = read_rows(given.questions, max(*counts.values(), 2 * OPTIONS))
    tasks = {
        name: make_task(name, rows[: 4 * SHOTS + count], given.tokens, scratch)
        for name, count in counts.items()
    }
    print(f"{torch.get_num_threads()} threads; times in seconds", flush=True)
    unequal = []
    if "likelihoods" in given.parts:
        probe = make_task("endings-probe", rows[: 4 * SHOTS + 1], given.tokens, scratch)
        unequal = likelihoods(given, folder, tasks, probe)
    if "answers" in given.parts:
        probe = make_task("gsm8k-probe", rows[: 4 * SHOTS + PROBED], 32, scratch)
        answers(given, folder, tasks["gsm8k"], probe)
    print(f"in all {time.monotonic() - started:.0f} s")
    if unequal:
        raise SystemExit(f"the scores of {', '.join(unequal)} differ by more than {TOLERANCE}")


def transformers_backend(folder: Path, dtype: str, batch: int) -> Backend:
    """The harness's own, in a precision."""
    model = HFLM(str(folder), device="cpu", dtype=dtype, batch_size=batch)
    return Backend(f"transformers {dtype}", model)


def likelihoods(
    given: argparse.Namespace, folder: Path, tasks: dict[str, Task], probe: Task
) -> list[str]:
    """Compare the tasks of log-likelihoods; returns those whose scores are not equal."""
    ours = Backend("ours float32", EngineLM(str(folder)))
    theirs = transformers_backend(folder, "float32", given.batches[0])
    speeds = {}
    for batch in given.batches:
        theirs.model.batch_size_per_gpu = batch
        theirs.times.clear()
        speeds[batch] = theirs.evaluate(probe)
        print(
            f"{'endings, probe':<15} {theirs.name}, batch {batch} {speeds[batch]:8.2f} s",
            flush=True,
        )
    best = theirs.model.batch_size_per_gpu = min(speeds, key=speeds.__getitem__)
    unequal = []
    for name in LIKELIHOODS:
        ours.evaluate(tasks[name], given.rounds)
        theirs.evaluate(tasks[name], given.their_rounds)
        note = f"{ours.scores(name)} | {theirs.scores(name)}"
        gap = largest_gap(ours.values(name), theirs.values(name))
        report(name, ours, theirs, f"{note}; log-likelihoods differ by {gap:.1e} of their size")
        pairs = zip(ours.numbers(name), theirs.numbers(name), strict=True)
        if gap > TOLERANCE or any(abs(a - b) > TOLERANCE for a, b in pairs):
            unequal.append(name)
    total("log-likelihood", ours, theirs, LIKELIHOODS)
    del theirs
    coarse = transformers_backend(folder, "bfloat16", best)
    for name in LIKELIHOODS:
        coarse.evaluate(tasks[name])
        gap = largest_gap(ours.values(name), coarse.values(name))
        report(name, ours, coarse, f"{coarse.scores(name)}; log-likelihoods differ by {gap:.1e}")
    total("log-likelihood", ours, coarse, LIKELIHOODS)
    return unequal


def answers(given: argparse.Namespace, folder: Path, task: Task, probe: Task) -> None:
    """Compare greedy answers."""
    found = []
    for dtype in ("float32", "bfloat16"):
        backend = transformers_backend(folder, dtype, given.answer_batch)
        found.append((backend.evaluate(probe), backend))
        print(f"{'gsm8k, probe':<15} {backend.name:<22} {found[-1][0]:8.2f} s", flush=True)
    _, theirs = min(found, key=lambda pair: pair[0])
    del found, backend
    ours = Backend(f"ours {given.quantize}", EngineLM(str(folder), quantize=given.quantize))
    ours.evaluate(task, given.rounds)
    theirs.evaluate(task, given.their_rounds)
    sides = ours.values(task.name), theirs.values(task.name)
    same = sum(a == b for a, b in zip(*sides, strict=True))
    words = [sum(len(ours.model.tok_encode(text)) for text in side) for side in sides]
    note = f"{ours.scores(task.name)} | {theirs.scores(task.name)}; equal answers {same}; tokens "
    report(task.name, ours, theirs, f"{note}{words[0]} | {words[1]}")
    total("generation", ours, theirs, [task.name])


def largest_gap(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of log-likelihoods, as a part of their size."""
    gaps = []
    for a, b in zip(ours, theirs, strict=True):
        one, other = (float(v[0]) if isinstance(v, list | tuple) else float(v) for v in (a, b))
        gaps.append(abs(one - other) / max(1.0, abs(other)))
    return max(gaps)


def report(task: str, ours: Backend, theirs: Backend, note: str) -> None:
    """One line."""
    a, b = (statistics.median(side.times[task]) for side in (ours, theirs))
    print(f"{task:<15} ours {a:8.2f}  {theirs.name} {b:8.2f}  {b / a:6.2f} ×  {note}", flush=True)


def total(line: str, ours: Backend, theirs: Backend, tasks: Any) -> None:
    """The sum of some tasks, with the spread of our rounds."""
    a, b = (sum(statistics.median(side.times[task]) for task in tasks) for side in (ours, theirs))
    spread = max(max(ours.times[task]) / min(ours.times[task]) for task in tasks)
    text = f"{line}: {ours.name} {a:.2f} s, {theirs.name} {b:.2f} s, ratio {b / a:.2f}"
    print(f"{text} (slowest round of ours / fastest: {spread:.2f})", flush=True)


if __name__ == "__main__":
    main()
