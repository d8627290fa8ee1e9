"""The engine's overhead over its model, by batch size, sampling and speculation.

    python benchmarks/engine.py MODEL [--quantize int8] [--threads 1] [--cache int8]

Tokens/s are by wall time; the parts of a step are by processor time of the calling thread:
`model` is the forward call with the head, `sample` the sampler, `rest` all else (planning, pages,
text).
"""

import argparse
import time
from pathlib import Path

import torch

import openqwen as oq
from openqwen.engine import EngineConfig, engine

CODE = "def area(width, height):\n    total = width * height\n    return total\n\n\n" * 3
KINDS = {
    "greedy": oq.Sampling(max_tokens=64, ignore_eos=True),
    "sampled": oq.Sampling(max_tokens=64, ignore_eos=True, temperature=1.0),
    "published": oq.Sampling(  # Qwen2.5's generation_config.json
        max_tokens=64, ignore_eos=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1
    ),
}
spent = {"model": 0.0, "sample": 0.0}


def timed(function, name):
    """The function, its seconds added to `spent`."""

    def run(*arguments):
        start = time.thread_time()
        result = function(*arguments)
        spent[name] += time.thread_time() - start
        return result

    return run


def chat(text):
    """One question."""
    return [{"role": "user", "content": text}]


def decode(model, tokenizer, config, sampling, batch):
    """A line on so many requests at once, all past their prompts."""
    machine = oq.Engine(model, tokenizer, config)
    machine._runner.run = timed(machine._runner.run, "model")
    requests = [
        machine.submit(chat(f"Write a Python function that adds {n} numbers."), sampling, n)
        for n in range(batch)
    ]
    while any(len(request.token_ids) < 3 for request in requests):
        machine.step()
    spent.update(model=0.0, sample=0.0)
    before, steps = machine.stats().tokens_out, 0
    wall, busy = time.perf_counter(), time.thread_time()
    while machine.busy:
        machine.step()
        steps += 1
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    parts = {**spent, "rest": busy - sum(spent.values())}
    shown = "  ".join(f"{name} {1e3 * seconds / steps:6.2f} ms" for name, seconds in parts.items())
    return f"{(machine.stats().tokens_out - before) / wall:6.1f} tokens/s   a step: {shown}"


def once(model, tokenizer, config, prompt, sampling):
    """One request from start to end: it, the engine's counts, and seconds."""
    machine = oq.Engine(model, tokenizer, config)
    start = time.perf_counter()
    request = machine.submit(prompt, sampling)
    while machine.busy:
        machine.step()
    return request, machine.stats(), time.perf_counter() - start


def main():
    """Print all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize")
    parser.add_argument("--cache", default="float")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = (
        oq.load_model(options.model, quantize=options.quantize),
        oq.load_tokenizer(options.model),
    )
    config = EngineConfig(cache=options.cache, prefix_cache=False)
    engine.sample = timed(engine.sample, "sample")
    for batch in (1, 4, 16):
        for name, sampling in KINDS.items():
            print(
                f"decode {batch:2} × {name:10} {decode(model, tokenizer, config, sampling, batch)}",
                flush=True,
            )
    prompt = (tokenizer.encode(CODE) * 1024)[:1024]
    for _ in range(2):
        _, _, seconds = once(model, tokenizer, config, prompt, oq.Sampling(max_tokens=1))
        print(f"prefill of 1,024: {1024 / seconds:.0f} tokens/s", flush=True)
    for most in (0, 8):
        again = chat(f"Repeat this code exactly, nothing else:\n{CODE}")
        speculate = config.model_copy(update={"speculate": most})
        request, stats, seconds = once(
            model, tokenizer, speculate, again, oq.Sampling(max_tokens=100)
        )
        rate = len(request.token_ids) / seconds
        print(
            f"copying, guessing up to {most}: {rate:.1f} tokens/s, {stats.accepted} of "
            f"{stats.drafted} guesses right"
        )


if __name__ == "__main__":
    main()
