"""The peer's side of `bench_align.py`: TRL's DPOTrainer and GRPOTrainer, without OpenQwen.

`bench_align.py` calls it with a job file. It prints the median seconds of the steps after the
first, the mean useful tokens of a step, and the most memory that the process held.
"""

import json
import resource
import statistics
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peer_training import Clock
from transformers import AutoTokenizer


def settings(job: dict, batch: int) -> dict:
    """What both trainers are told."""
    low = job["precision"] == "bfloat16"
    return {
        "output_dir": str(Path(job["folder"]) / "peer"),
        "per_device_train_batch_size": batch,
        "max_steps": job["steps"],
        "learning_rate": job["rate"],
        "bf16": low,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_strategy": "no",
        "dataloader_num_workers": 0,
    }


def rows_of(job: dict) -> list[dict]:
    """The pairs that both sides read."""
    lines = (Path(job["folder"]) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][: job["batch"] * job["steps"]]


def dpo(job: dict, clock: Clock) -> float:
    """DPO with TRL's defaults; the reference is a second model, asked in each step."""
    from trl import DPOConfig, DPOTrainer

    tokenizer, rows = AutoTokenizer.from_pretrained(job["model"]), rows_of(job)
    config = DPOConfig(**settings(job, job["batch"]), beta=0.1, max_length=4_096)
    DPOTrainer(
        job["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()
    talks = [[*row["prompt"], *row[side]] for row in rows for side in ("chosen", "rejected")]
    total = sum(
        len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks
    )
    return total / job["steps"]


def grpo(job: dict, clock: Clock) -> float:
    """GRPO with the paper's loss; answers are sampled by transformers' `generate`."""
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, rows = AutoTokenizer.from_pretrained(job["model"]), rows_of(job)
    sizes: list[int] = []

    def letters(prompts: list, completions: list, completion_ids: list, **_: object) -> list[float]:
        """The same reward as the other side's; counts tokens besides."""
        asked = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)
            for p in prompts
        ]
        sizes.append(sum(len(one["input_ids"]) for one in asked) + sum(map(len, completion_ids)))
        texts = [answer[0]["content"] for answer in completions]
        return [sum(letter in "aeiou" for letter in text) / 64 for text in texts]

    config = GRPOConfig(
        **settings(job, job["batch"] * job["samples"]),
        num_generations=job["samples"],
        max_completion_length=job["answer"],
        temperature=1.0,
        beta=1e-3,
        loss_type="grpo",
    )
    GRPOTrainer(
        job["model"],
        letters,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()
    return statistics.mean(sizes)


def main() -> None:
    """Run the job and print what was measured."""
    job, clock = json.loads(Path(sys.argv[1]).read_text()), Clock()
    tokens = {"dpo": dpo, "grpo": grpo}[job["kind"]](job, clock)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    seconds = statistics.median(clock.times[1:])
    print("\n" + json.dumps({"seconds": seconds, "tokens": tokens, "memory": memory}))


if __name__ == "__main__":
    main()
