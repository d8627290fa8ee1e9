"""The real checkpoint beside transformers: logits, answers, conversion and speed.

    python benchmarks/real_checkpoint.py [--peer PYTHON] [--threads 1] [--repeat 3] [--only parity round-trip speed]

Needs the file of OPENQWEN_REAL_CHECKPOINT (a .gguf) and the texts of OPENQWEN_SHARED_DATA. PYTHON
has transformers, accelerate and gguf beside openqwen's own dependencies; without it this
interpreter is used. All is float32 on the CPU.

parity: logits of 1,000 tokens of real text, and whether each of our greedy tokens (20 prompts, 64
tokens) is what transformers finds likeliest at that place, which is to say that it would have
chosen the same. round-trip: .gguf to folder to .gguf. speed: load time, peak memory, prefill and
decode, each side in a fresh process, in turn, medians.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
REAL = Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
CHECKPOINT = Path(os.environ.get("OPENQWEN_REAL_CHECKPOINT", REAL))
DATA = Path(os.environ.get("OPENQWEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
TOKENS, ANSWER, PREFILL, DECODE = 1_000, 64, 512, 32


def records(name: str) -> list[dict[str, Any]]:
    """The lines of a file of the shared data."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def text_ids(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of a speech, a poem and a program, a third of each."""
    texts = [
        records("corpus/us_presidential_speeches.jsonl.gz")[0]["text"],
        "\n".join(record["text"] for record in records("corpus/classical_zh.jsonl.gz")[:200]),
        "\n".join(
            record["prompt"] + record["canonical_solution"]
            for record in records("eval/HumanEval.jsonl.gz")[:9]
        ),
    ]
    return [token for text in texts for token in tokenizer.encode(text)[: -(-count // 3)]][:count]


def chats() -> list[list[dict[str, str]]]:
    """Twenty prompts: conversation, code, arithmetic."""
    prompts = [record["turns"][0] for record in records("eval/mt_bench_question.jsonl.gz")[::8]]
    prompts += [
        f"Complete this function.\n\n{record['prompt']}"
        for record in records("eval/HumanEval.jsonl.gz")[::33]
    ]
    prompts += [record["question"] for record in records("eval/gsm8k_train.jsonl.gz")[:5]]
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def reference() -> Any:
    """transformers' own reading of the file."""
    from transformers import AutoModelForCausalLM

    folder, name = CHECKPOINT.parent, CHECKPOINT.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@torch.inference_mode()
def parity() -> None:
    """See the module."""
    from openqwen import Engine, Packed, Sampling, load_model, load_tokenizer

    tokenizer, ours, theirs = load_tokenizer(CHECKPOINT), load_model(CHECKPOINT), reference()
    state, other = ours.state_dict(), theirs.state_dict()
    same = sum(torch.equal(tensor, other[name]) for name, tensor in state.items())
    print(f"weights: {same} of {len(state)} tensors are the same bits")

    ids = torch.tensor(text_ids(tokenizer, TOKENS))
    logits = ours.logits(ours(ids, torch.arange(len(ids)), Packed.from_lengths([len(ids)])))
    expected = theirs(ids[None]).logits[0]
    agree = (logits.argmax(-1) == expected.argmax(-1)).double().mean()
    error = (logits - expected).norm() / expected.norm()
    worst = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    print(
        f"logits of {len(ids):,} tokens: top-1 agreement {agree:.2%},"
        f" relative error {error:.1e}, worst token {worst:.1e}"
    )

    outputs = Engine(ours, tokenizer).generate(chats(), Sampling(max_tokens=ANSWER))
    whole = tokens = 0
    for output in outputs:
        made = output.token_ids + ([tokenizer.eos_id] if output.finish_reason == "stop" else [])
        likeliest = theirs(torch.tensor([output.prompt_ids + made])).logits[0].argmax(-1)
        chosen = likeliest[len(output.prompt_ids) - 1 : -1].tolist()
        whole += chosen == made
        tokens += len(made)
    print(f"greedy answers: {whole} of {len(outputs)} the same, {tokens:,} tokens")


def round_trip() -> None:
    """See the module."""
    from openqwen import Engine, Sampling, load_model, load_tokenizer
    from openqwen.train.convert import convert

    def answers(path: Path) -> list[list[int]]:
        engine = Engine(load_model(path), load_tokenizer(path))
        return [
            output.token_ids for output in engine.generate(chats(), Sampling(max_tokens=ANSWER))
        ]

    expected, exact = answers(CHECKPOINT), load_model(CHECKPOINT).state_dict()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        convert(str(CHECKPOINT), folder)
        paths = [folder]
        for kind in ("f32", "f16", "q8_0"):
            paths.append(Path(place) / f"{kind}.gguf")
            convert(str(folder), paths[-1], type=kind)
        for path in paths:
            same = sum(a == b for a, b in zip(answers(path), expected))
            state = load_model(path).state_dict()
            equal = sum(torch.equal(state[name], tensor) for name, tensor in exact.items())
            print(
                f"{path.name}: {equal} of {len(exact)} tensors the same bits,"
                f" {same} of {len(expected)} answers the same"
            )


def peak_memory() -> int:
    """Return this process's peak memory in bytes (on Linux, ru_maxrss starts at the parent's)."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure(
    load: Callable[[], Any], prefill: Callable[..., Any], decode: Callable[..., int]
) -> None:
    """Times in this process, and the most memory it ever had, as one line of JSON."""
    before = peak_memory()
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    peak = peak_memory()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    prefill(model)  # a first run reads pages and warms up
    start = time.perf_counter()
    prefill(model)
    read = time.perf_counter() - start
    start = time.perf_counter()
    made = decode(model)
    rate = made / (time.perf_counter() - start)
    ratio = (peak - before) / weights
    print(
        json.dumps(
            {
                "load s": loaded,
                "memory / weights": ratio,
                "prefill tok/s": PREFILL / read,
                "decode tok/s": rate,
            }
        )
    )


@torch.inference_mode()
def ours() -> None:
    """One measurement of OpenQwen."""
    from openqwen import Engine, Packed, Sampling, load_model, load_tokenizer

    tokenizer = load_tokenizer(CHECKPOINT)
    ids, attention = torch.tensor(text_ids(tokenizer, PREFILL)), Packed.from_lengths([PREFILL])

    def decode(model: Any) -> int:
        [output] = Engine(model, tokenizer).generate(
            [ids[:16].tolist()], Sampling(max_tokens=DECODE)
        )
        return len(output.token_ids)

    measure(
        lambda: load_model(CHECKPOINT),
        lambda model: model.logits(model(ids, torch.arange(PREFILL), attention)[-1:]),
        decode,
    )


@torch.inference_mode()
def transformers() -> None:
    """One measurement of transformers."""
    from openqwen import load_tokenizer

    ids = torch.tensor([text_ids(load_tokenizer(CHECKPOINT), PREFILL)])

    def decode(model: Any) -> int:
        plain = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": DECODE}
        return model.generate(ids[:, :16], attention_mask=torch.ones(1, 16), **plain).shape[1] - 16

    measure(reference, lambda model: model(ids, logits_to_keep=1), decode)


def speed(options: argparse.Namespace) -> None:
    """See the module."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    for _ in range(options.repeat):
        for side, results in runs.items():
            results.append(json.loads(again(options, side).splitlines()[-1]))
    print(f"{'':<14}" + "".join(f"{name:>18}" for name in runs["ours"][0]))
    for side, results in runs.items():
        medians = [statistics.median(result[name] for result in results) for name in results[0]]
        print(f"{side:<14}" + "".join(f"{value:>18.2f}" for value in medians))


def again(options: argparse.Namespace, step: str) -> str:
    """Run one step in a fresh process; returns what it printed."""
    command = [options.peer, __file__, "--step", step, "--threads", str(options.threads)]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip()


def main() -> None:
    """See the module."""
    steps = {"parity": parity, "round-trip": round_trip, "ours": ours, "transformers": transformers}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["parity", "round-trip", "speed"])
    parser.add_argument("--step", choices=steps, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := [path for path in (CHECKPOINT, DATA) if not path.exists()]:
        sys.exit(f"not here: {', '.join(map(str, missing))}")
    torch.set_num_threads(options.threads)
    if options.step:
        steps[options.step]()
        return
    for name in options.only:
        speed(options) if name == "speed" else print(again(options, name), flush=True)


if __name__ == "__main__":
    main()
