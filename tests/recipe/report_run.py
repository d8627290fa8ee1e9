"""A run folder with every stage's artifacts, and the page that is made of it."""

import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

INPUTS = {
    "corpus": [],
    "tokenizer": ["corpus"],
    "tokens": ["corpus", "tokenizer"],
    "pretrain": ["tokens", "tokenizer"],
    "extend": ["tokens", "pretrain"],
    "instruct": ["corpus", "extend"],
    "sft": ["instruct", "extend"],
    "prefer": ["instruct", "sft"],
    "reward": ["prefer", "sft"],
    "dpo": ["prefer", "sft"],
    "online-dpo": ["instruct", "sft", "reward"],
    "evaluate-pretrain": ["pretrain", "corpus"],
    "evaluate-extend": ["extend", "corpus"],
    "evaluate-sft": ["sft", "extend", "corpus"],
    "evaluate-reward": ["reward", "prefer"],
    "evaluate-dpo": ["dpo", "evaluate-sft", "reward", "corpus"],
    "evaluate-online-dpo": ["online-dpo", "evaluate-sft", "reward", "corpus"],
}
STAGES = list(INPUTS)[:11]
# Of each training stage: seconds, steps, first and last loss.
TRAINING = {
    "pretrain": (312.4, 1500, 8.3, 2.4),
    "extend": (48.0, 150, 2.42, 2.33),
    "sft": (52.3, 240, 2.9, 0.8),
    "reward": (22.9, 120, 0.7, 0.4),
    "dpo": (35.7, 120, 0.693, 0.45),
    "online-dpo": (96.6, 60, 0.69, 0.58),
}
# Of each evaluated stage: bits per byte, checked accuracy.
RESULTS = {
    "pretrain": (1.941, 0.09),
    "extend": (1.902, 0.1),
    "sft": (1.931, 0.52),
    "dpo": (1.938, 0.6),
    "online-dpo": (1.944, 0.66),
}
CHANCE = {
    "addition": 0.01,
    "count letters": 0.12,
    "reverse a word": 0.0,
    "uppercase": 0.0,
    "yes or no": 0.5,
}
SECTIONS = (
    "lineage",
    "scores",
    "tasks",
    "reward",
    "samples",
    "training",
    "corpus",
    "tokenizer",
    "instructions",
    "configuration",
)
HOSTILE = (
    'A sample </div><script>alert("x")</script> \u202eevil\x07 \ud800 <img src=x onerror=alert(1)>'
)


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def build_run(folder: Path, until: str = "online-dpo", record: dict | None = None) -> Path:
    """A run folder as the recipe leaves it, with invented but likely content; `until` stops after
    that stage.
    """
    names = STAGES[: STAGES.index(until) + 1]
    names += [f"evaluate-{name}" for name in names if f"evaluate-{name}" in INPUTS]
    payloads = {"corpus": write_corpus, "tokenizer": write_tokenizer, "tokens": write_tokens}
    payloads |= {"instruct": write_instruct, "prefer": write_prefer}
    for name in names:
        stored = folder / ".store" / f"{name}-{digest(name)[:12]}"
        stored.mkdir(parents=True)
        (folder / name).symlink_to(stored.relative_to(folder))
        dump(stored / "manifest.json", manifest(name))
        if name in payloads:
            payloads[name](stored)
        if name in TRAINING:
            dump_lines(stored / "metrics.jsonl", metrics(name))
        if name == "online-dpo":
            dump_lines(stored / "samples.jsonl", episode_samples())
        if name.startswith("evaluate-"):
            dump(stored / "scores.json", scores(name.removeprefix("evaluate-")))
        if name.removeprefix("evaluate-") in RESULTS and name not in RESULTS:
            dump(stored / "samples.json", samples(name.removeprefix("evaluate-")))
    if record:
        dump(folder / "run.json", record)
    return folder


def manifest(name: str) -> dict:
    return {
        "stage": name,
        "kind": name.split("-")[0],
        "key": digest("key" + name),
        "digest": digest(name),
        "seed": 7,
        "config": {
            "steps": 1500,
            "train": {"learning_rate": 3e-4, "warmup": 0.05, "betas": [0.9, 0.95]},
        },
        "inputs": {i: {"stage": i, "digest": digest(i)} for i in INPUTS[name]},
        "files": {"model.safetensors": {"bytes": 14_000_000, "sha256": digest("file")}},
        "code": {"version": "0.1.0", "digest": digest("code")},
        "machine": {
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_gb": 8.2,
            "torch": "2.13.0+cpu",
            "device": "cpu",
        },
        "created": "2026-01-02T03:04:05Z",
        "seconds": TRAINING[name][0] if name in TRAINING else 7.4,
        "metrics": {"loss": 2.25, "steps": 1500, "margin": None},
    }


def metrics(name: str) -> list[dict]:
    draw = np.random.default_rng(len(name))
    _, steps, first, last = TRAINING[name]
    records = []
    for step in range(steps):
        done = step / steps
        record = {
            "step": step,
            "loss": last + (first - last) * math.exp(-6 * done) + 0.08 * draw.standard_normal(),
            "gradient_norm": 0.5 + abs(draw.standard_normal()),
            "learning_rate": 3e-4
            * min((step + 1) / (0.05 * steps), 0.55 + 0.45 * math.cos(math.pi * done)),
            "tokens": 8192,
            "tokens_per_second": 8192 / 0.4,
            "seconds": 0.4,
        }
        if name in ("reward", "dpo", "online-dpo"):
            record["margin"] = 1.4 * done + 0.2 * draw.standard_normal()
            record["accuracy"] = min(1, 0.5 + 0.35 * done + 0.08 * draw.random())
        if name == "online-dpo":
            record["reward"] = -0.4 + done + 0.2 * draw.standard_normal()
            record["length"] = 30 + 4 * draw.standard_normal()
            record["kl"] = 0.01 * done
            record["win_rate"] = 0.5 + 0.2 * done
        records.append(record)
    if name == "online-dpo":  # as the trainer logs a step in which no pair was found
        records[30] = {
            "step": 30,
            "loss": 0.0,
            "gradient_norm": 0.0,
            "learning_rate": 1e-5,
            "tokens": 0,
            "seconds": 0.4,
        }
    return records


def interval(key: str, value: float, low: float, high: float) -> dict:
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def reward_bins() -> dict:
    """What `evaluate.reward_report` says of 212 test pairs."""

    def row(accuracy: float) -> dict:
        return {"accuracy": accuracy, "low": accuracy - 0.15, "high": accuracy + 0.12, "n": 35}

    predicted = (0.52, 0.56, 0.62, 0.7, 0.81, 0.94)
    ends = ((-140, -41), (-40, -12), (-11, -1), (0, 9), (10, 44), (45, 210))
    return {
        "test_calibration": [{"predicted": p, **row(0.9 * p + 0.02)} for p in predicted],
        "test_calibration_error": 0.047,
        "test_by_length": [
            {"from": low, "to": high, **row(0.55 + 0.06 * n)} for n, (low, high) in enumerate(ends)
        ],
        "test_prefers_longer": 0.64,
        "test_chosen_longer": 0.52,
        "test_by_criterion": {"truthfulness": row(0.81), "conciseness": row(0.72)},
    }


def scores(name: str) -> dict:
    if name == "reward":
        by_task = {
            task: {"accuracy": 0.66 + 0.05 * i, "n": 40 + i} for i, task in enumerate(CHANCE)
        }
        whole = interval("test_pair_accuracy", 0.783, 0.722, 0.833) | interval(
            "test_near_accuracy", 0.612, 0.54, 0.68
        )
        whole |= {"test_pair_accuracy_n": 212, "pair_accuracy_by_task": by_task}
        return whole | reward_bins()
    bits, accuracy = RESULTS[name]
    reached = {
        task: min(1.0, max(c * 0.9, accuracy + 0.1 * i - 0.2))
        for i, (task, c) in enumerate(CHANCE.items())
    }
    found = {"gzip_bits_per_byte": 2.214} | {
        **interval("bits_per_byte", bits, bits - 0.1, bits + 0.1),
        "bits_per_byte_by_source": {
            "python code": bits - 0.2,
            "docstrings": bits + 0.3,
            "readme": bits + 0.1,
        },
        "checked_accuracy": accuracy,
        "checked_by_task": {
            task: {"accuracy": reached[task], "chance": CHANCE[task], "n": 100} for task in CHANCE
        },
        "chance": 0.126,
        "gzip_bits_per_byte_by_source": {"python code": 2.1, "docstrings": 2.6, "readme": 2.8},
    }
    if name in ("pretrain", "extend"):
        found["loss_by_position"] = [[0, 128, 2.75], [128, 256, 2.5], [256, 300, 1.5 * bits]]
    if name in ("sft", "dpo", "online-dpo"):
        found |= {"retention": bits / RESULTS["extend"][0], "reward_mean": accuracy - 0.5}
        found |= interval("test_accuracy", accuracy - 0.01, accuracy - 0.03, accuracy + 0.01)
        found |= interval("test_at_0.7_accuracy", accuracy - 0.05, accuracy - 0.07, accuracy - 0.03)
        found |= interval("test_sampled_accuracy", accuracy - 0.1, accuracy - 0.12, accuracy - 0.08)
    if name == "sft":
        found |= interval("test_cooler_gain", 0.033, 0.021, 0.045)
    if name in ("dpo", "online-dpo"):
        found |= {
            "start": "sft",
            "win_rate": 0.581,
            "win_rate_low": 0.523,
            "win_rate_high": 0.637,
            "win_rate_checked": 0.54,
        }
        found |= interval("test_gain", accuracy - 0.52, accuracy - 0.54, accuracy - 0.5)
        found |= interval("test_at_0.7_gain", 0.008, -0.004, 0.02)
        found |= interval("test_sampled_gain", 0.031, 0.012, 0.05)
    return found


def samples(name: str) -> list[dict]:
    code = f'"""Return the n-th number."""\n    return {name!r}'
    chats = {
        "What is 17 + 25?": "42" if name != "extend" else "\nThe the the of the",
        "Write 'banana' backwards.": "ananab" if "dpo" in name else "",
        "Say something long.": f"{name} word " * 300,
        HOSTILE: HOSTILE,
        "Who are you?": "I am a small model.",
    }
    return [
        {"prompt": "def fibonacci(n):\n    ", "answer": code, "kind": "continuation"},
        *({"prompt": prompt, "answer": answer, "kind": "chat"} for prompt, answer in chats.items()),
    ]


def episode_samples() -> list[dict]:
    return [
        {"step": step, "prompt": "Say it.", "answer": f"in episode {step}", "reward": 0.1 * step}
        for step in range(60)
    ] + [{"step": 59, "prompt": "Say it.", "answer": HOSTILE.replace("\ud800", ""), "reward": -1.0}]


def write_corpus(folder: Path) -> None:
    def reason(documents: int, text: str = "TABLE = [0x00, 0x01,\n         0x03, 0x04]") -> dict:
        examples = [
            {"id": f"python/lib/x{i}.py", "excerpt": text, "why": "mean word length 1.7"}
            for i in range(3)
        ]
        return {"documents": documents, "bytes": documents * 2100, "examples": examples}

    def step(name: str, kept: int, reasons: dict, cut: bool = False) -> dict:
        dropped = 0 if cut else sum(found["documents"] for found in reasons.values())
        removed = sum(found["bytes"] for found in reasons.values())
        sizes = {
            "kept": kept,
            "dropped": dropped,
            "kept_bytes": kept * 2800,
            "dropped_bytes": removed,
        }
        return {"name": name, **sizes, "reasons": reasons}

    filters = {
        "too many symbols": reason(310),
        "repeated lines": reason(804),
        "too short": reason(1630, HOSTILE),
    }
    weights = {
        "python code": (3100, 0.5),
        "docstrings": (1400, 0.2),
        "readme": (815, 0.25),
        "tasks": (2000, 0.05),
    }
    sources = {
        name: {
            "documents": n - n // 50,
            "bytes": n * 2740,
            "heldout_documents": n // 50,
            "heldout_bytes": n * 60,
            "weight": weight,
            "gzip_bits_per_byte": 2.1 + weight,
        }
        for name, (n, weight) in weights.items()
    }
    not_text = {"file": "lib/test/bad_coding.py", "line": None, "why": "byte 0xff at 17"}
    not_json = {"file": "extra.jsonl", "line": 17, "why": "Expecting ',' delimiter"}
    report = {
        "read": {"files": 5120, "documents": 9210, "bytes": 28_400_000},
        "skipped": {
            "not UTF-8": {"count": 3, "examples": [not_text]},
            "not JSON": {"count": 1, "examples": [not_json]},
        },
        "steps": [
            step("clean", 8970, {"empty": reason(240, "   ")}),
            step("filter", 6226, filters),
            step("exact", 6226 + 2000 - 412, {"exact duplicate": reason(412)}),
            step("near", 5315, {"near-duplicate": reason(499)}),
            step(
                "paragraphs", 5315, {"repeated comment": reason(1290, "# Licensed under")}, cut=True
            ),
        ],
        "sources": sources,
        "gzip_bits_per_byte": 2.214,
    }
    dump(folder / "corpus.json", report)


def write_tokenizer(folder: Path) -> None:
    text = "def  read_file(path):\n\treturn open(path, encoding='utf-8').read()  # naïve 2024\n"
    tokens = re.findall(r"\s?\w+|\s+|[^\w\s]+", text)
    statistics = {
        "vocabulary": 4099,
        "merges": 3840,
        "bytes_per_token": {"python code": 3.41, "docstrings": 3.9, "readme": 3.2},
        "training_bytes": 15_100_000,
        "longest": [" " * 32, "#" * 16, "self.assertEqual", " implementation", "\n\n\n\n"],
        "examples": [{"text": text, "tokens": tokens}, {"text": text * 30, "tokens": tokens * 30}],
    }
    dump(folder / "statistics.json", statistics)


def write_tokens(folder: Path) -> None:
    tokens = {
        "python code": 4_100_000,
        "docstrings": 900_000,
        "readme": 1_700_000,
        "tasks": 310_000,
    }
    dump(
        folder / "tokens.json",
        {s: {"tokens": n, "documents": n // 700, "bytes": 3 * n} for s, n in tokens.items()},
    )


def write_instruct(folder: Path) -> None:
    kinds = [("repurpose", "docstring", 1400), *(("program", task, 300) for task in CHANCE)]
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{task} {i}?"},
                {"role": "assistant", "content": f"Answer {i}"},
            ],
            "origin": {"method": method, "task": task, "seed": i, "parents": []},
        }
        for method, task, n in [*kinds, ("rejection", "addition", 12)]
        for i in range(n)
    ]
    dump_lines(folder / "demonstrations.jsonl", records)
    dump_lines(
        folder / "prompts.jsonl",
        [{"prompt": r["messages"][:1], "origin": r["origin"]} for r in records[::3]],
    )


def write_prefer(folder: Path) -> None:
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Write the word number {i} backwards."}],
            "chosen": [{"role": "assistant", "content": "drow"}],
            "rejected": [{"role": "assistant", "content": "word word"}],
            "origin": {"method": "rejection", "task": task, "seed": i, "parents": []},
        }
        for task in CHANCE
        for i in range(150)
    ]
    dump_lines(folder / "preferences.jsonl", pairs)
    dump_lines(folder / "heldout.jsonl", pairs[::9])
    written_by = {"model/model": 510, "model/program": 130, "program/model": 110}
    dump(folder / "prefer.json", {"by_author": written_by, "sampled_accuracy": 0.53})


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every element that was opened was
    closed in turn.
    """

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def shown(self) -> str:
        """The text as a browser shows it, where it keeps no line ends."""
        return re.sub(r"[ \n\t]+", " ", self.text)
