"""The peer's side of `bench_train.py`; it runs under the peer's Python without OpenQwen.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements-sft.txt      # beside PyTorch, CPU build
    python benchmarks/bench_train.py --kind sft --data gsm8k_train.jsonl.gz --model MODEL --peer peers/bin/python

`bench_train.py` calls it with a job file. It prints the median useful tokens/s of the steps after
the first and the most memory that the process held.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *_, **__):
        """A step begins."""
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        """Its weights have moved."""
        self.times[-1] = time.perf_counter() - self.times[-1]


def settings(job: dict) -> dict:
    """What both trainers are told."""
    return {
        "output_dir": str(Path(job["folder"]) / "peer"),
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "learning_rate": job["rate"],
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_strategy": "no",
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "sequential",
    }


def sft(job: dict, clock: Clock) -> list[int]:
    """TRL with its defaults for prompts and completions; without FlashAttention it pads.

    Tokens of each row.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = (Path(job["folder"]) / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    talks = [json.loads(line)["messages"] for line in lines if line]
    rows = Dataset.from_list([{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    config = SFTConfig(**settings(job), max_length=job["context"], shuffle_dataset=False)
    SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
    ).train()
    return [
        len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks
    ]


def pretrain(job: dict, clock: Clock) -> list[int]:
    """transformers' Trainer on rows padded to the longest of a batch.

    Tokens of each row that predict one.
    """
    folder = Path(job["folder"])
    rows = [{"input_ids": ids} for ids in json.loads((folder / "rows.json").read_text())]
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(**json.loads((folder / "config.json").read_text())), dtype=torch.float32
    )

    def padded(batch: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in batch)
        ids, masks, labels = [], [], []
        for row in batch:
            empty = longest - len(row["input_ids"])
            ids.append(row["input_ids"] + [0] * empty)
            masks.append([1] * len(row["input_ids"]) + [0] * empty)
            labels.append(row["input_ids"] + [-100] * empty)
        parts = {"input_ids": ids, "attention_mask": masks, "labels": labels}
        return {name: torch.tensor(part) for name, part in parts.items()}

    Trainer(
        model, TrainingArguments(**settings(job)), padded, train_dataset=rows, callbacks=[clock]
    ).train()
    return [len(row["input_ids"]) - 1 for row in rows]


def main() -> None:
    """Run the job and print what was measured."""
    job, clock = json.loads(Path(sys.argv[1]).read_text()), Clock()
    tokens = {"sft": sft, "pretrain": pretrain}[job["kind"]](job, clock)
    steps = [sum(tokens[i : i + job["batch"]]) for i in range(0, len(tokens), job["batch"])]
    speed = statistics.median(n / t for n, t in zip(steps[1:], clock.times[1:], strict=True))
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    print("\n" + json.dumps({"speed": speed, "memory": memory}))


if __name__ == "__main__":
    main()
