"""GGUF files in llama.cpp: what OpenQwen writes loads there and gives the same answers.

    python benchmarks/gguf_llama_cpp.py --peer PYTHON [--source SOURCE] [--types f16 q8_0 q4_0] [--tokens 48]

PYTHON is the interpreter of an environment of its own with llama-cpp-python. SOURCE is a folder, a
.gguf file or a hub id; without it the real checkpoint (OPENQWEN_REAL_CHECKPOINT) is used. Each type
is written into a temporary folder, read back by both, and answers three prompts greedily. llama.cpp
rounds activations (to float16 for F16, to int8 for blocks) and so may part from float32 arithmetic
where two tokens are nearly as likely: the gap between them is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REAL = Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
QUESTIONS = [
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of France? Answer in one sentence.",
    "用一句话解释什么是递归。",
]


def peer(path: str, job: str) -> None:
    """Tokenize each text and continue it greedily, in the peer's environment; print JSON."""
    from llama_cpp import Llama

    work = json.loads(job)
    llama = Llama(
        path, n_ctx=1024, n_threads=work["threads"], type_k=0, type_v=0, verbose=False
    )  # 0: float32
    answers = []
    for text in work["texts"]:
        prompt = llama.tokenize(text.encode(), add_bos=False, special=True)
        llama.reset()
        made: list[int] = []
        for token in llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            if token in work["stops"] or len(made) == work["tokens"]:
                break
            made.append(token)
        answers.append({"prompt": prompt, "made": made})
    template = llama.metadata.get("tokenizer.chat_template", "")
    print(json.dumps({"answers": answers, "template": template, "eos": llama.token_eos()}))


def compare(path: Path, python: str, tokens: int) -> None:
    """Both engines on one file; prints a line a prompt."""
    import torch

    from openqwen import Engine, Packed, Sampling, load_model, load_tokenizer

    tokenizer = load_tokenizer(path)
    model = load_model(path)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    job = {
        "texts": texts,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "stops": [tokenizer.eos_id, tokenizer.endoftext_id],
    }
    command = [python, __file__, "--as-peer", str(path), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed on {path}:\n{done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    outputs = Engine(model, tokenizer).generate(chats, Sampling(max_tokens=tokens))
    template = "same" if theirs["template"] == tokenizer.template else "DIFFERENT"
    print(f"{path.name}: {path.stat().st_size / 1e6:,.0f} MB, template {template}")
    for ours, other in zip(outputs, theirs["answers"]):
        assert ours.prompt_ids == other["prompt"], "the prompt is cut into other tokens"
        made = other["made"]
        same = next(
            (i for i, (a, b) in enumerate(zip(ours.token_ids, made)) if a != b),
            min(len(made), len(ours.token_ids)),
        )
        if ours.token_ids == made:
            print(f"  all {same} tokens the same: {ours.text[:60]!r}")
            continue
        ids = torch.tensor(ours.prompt_ids + ours.token_ids[:same])
        with torch.inference_mode():
            hidden = model(ids, torch.arange(len(ids)), Packed.from_lengths([len(ids)]))
            scores = torch.log_softmax(model.logits(hidden[-1:])[0], -1)
        pair = [[*made, tokenizer.eos_id][same] for made in (ours.token_ids, made)]
        gap = float(scores[pair[0]] - scores[pair[1]])
        ours_next, theirs_next = (tokenizer.decode([token], skip_control=False) for token in pair)
        print(
            f"  {same} tokens the same, then {ours_next!r} here, {theirs_next!r} there, "
            f"{gap:.3f} nat apart"
        )


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--as-peer"]:
        peer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True)
    parser.add_argument("--source", default=os.environ.get("OPENQWEN_REAL_CHECKPOINT", str(REAL)))
    parser.add_argument("--types", nargs="*", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    from openqwen.train.convert import convert

    if options.source.endswith(".gguf"):
        compare(Path(options.source), options.peer, options.tokens)
    for kind in options.types:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kind}.gguf"
            convert(options.source, path, type=kind)
            compare(path, options.peer, options.tokens)


if __name__ == "__main__":
    main()
