"""Supervised fine-tuning against TRL's SFTTrainer: useful tokens a second and peak memory, float32, all weights.

Both train on the same conversations in the same order, `--batch` of them a step, learn the answers alone, with AdamW
and clipping. A useful token is one that is no padding. Each runs in a process of its own, one after the other, as
often as `--repeats` says; medians of the steps after the first.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements-sft.txt      # beside PyTorch, CPU build
    .venv/bin/openqwen convert MODEL.gguf real
    .venv/bin/python benchmarks/sft.py --model real --data gsm8k_train.jsonl.gz --peer peers/bin/python
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def conversations(data: Path, count: int) -> list[dict]:
    """The first GSM8K problems as a prompt and an answer."""
    import gzip

    lines = gzip.decompress(data.read_bytes()).decode().split("\n")[:count]
    rows = [json.loads(line) for line in lines]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def ours(options: argparse.Namespace) -> dict[str, float]:
    """The stage `sft` itself, on a JSONL file."""
    from openqwen.tokenizer import load_tokenizer
    from openqwen.train.optimizer import OptimizerConfig
    from openqwen.train.sft import SftConfig, sft
    from openqwen.train.trainer import SaveConfig

    rows = conversations(options.data, options.batch * options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demonstrations = [json.dumps({"messages": row["prompt"] + row["completion"]}) for row in rows]
        (folder / "d.jsonl").write_text("\n".join(demonstrations) + "\n")
        config = SftConfig(
            epochs=1,
            batch=options.batch,
            max_length=1_024,
            train=OptimizerConfig(learning_rate=1e-5, recompute=options.recompute),
            save=SaveConfig(seconds=1e9),
        )
        tokenizer = load_tokenizer(options.model)
        sft(config, options.model, folder / "d.jsonl", tokenizer, folder / "out", folder / "scratch", 0, "sft")
        log = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    speeds = [entry["tokens_per_second"] for entry in log[1:]]
    return {"speed": statistics.median(speeds), "share": statistics.median(e.get("peak_share", 0) for e in log[1:])}


def trl(options: argparse.Namespace) -> dict[str, float]:
    """TRL with its defaults for prompts and completions; without FlashAttention it pads."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = conversations(options.data, options.batch * options.steps)
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"])
        for row in rows
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times[-1] = time.perf_counter() - times[-1]

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            max_length=1_024,
            learning_rate=1e-5,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            shuffle_dataset=False,
            dataloader_num_workers=0,
            train_sampling_strategy="sequential",
        )
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(Clock())
        trainer.train()
    batches = [sum(lengths[i : i + options.batch]) for i in range(0, len(lengths), options.batch)]
    return {"speed": statistics.median(n / t for n, t in zip(batches[1:], times[1:], strict=True))}


def child(kind: str, options: argparse.Namespace, python: str) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [python, __file__, "--side", kind, "--model", str(options.model), "--data", str(options.data)]
    command += ["--batch", str(options.batch), "--steps", str(options.steps), "--recompute", options.recompute]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(done.stdout.strip().split("\n")[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", help="the python that has TRL")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--recompute", choices=["nothing", "cheap", "layers"], default="nothing")
    parser.add_argument("--side", choices=["ours", "trl"])
    options = parser.parse_args()
    if options.side:
        found = {"ours": ours, "trl": trl}[options.side](options)
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        print("\n" + json.dumps(found | {"memory": memory}))
        return
    runs = [
        (child("ours", options, sys.executable), child("trl", options, options.peer)) for _ in range(options.repeats)
    ]
    print(f"{'':10} {'tokens/s':>9} {'GiB':>6}")
    for side, name in enumerate(("OpenQwen", "TRL")):
        speed = statistics.median(run[side]["speed"] for run in runs)
        memory = statistics.median(run[side]["memory"] for run in runs)
        print(f"{name:10} {speed:9.1f} {memory:6.2f}")
    speed = statistics.median(a["speed"] / b["speed"] for a, b in runs)
    memory = statistics.median(a["memory"] / b["memory"] for a, b in runs)
    print(f"{'ratio':10} {speed:8.2f}× {memory:5.2f}×   share of the GEMM peak {runs[0][0]['share']:.0%}")


if __name__ == "__main__":
    main()
