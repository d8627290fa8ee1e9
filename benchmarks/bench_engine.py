"""Speed of the engine beside llama.cpp: prefill, decode, batches, speculation, warm prefixes.

    python benchmarks/bench_engine.py MODEL --peer PYTHON

Both sides do the same work in turn, `rounds` times; medians are printed. llama.cpp reads files that
are converted from the same checkpoint: Q8_0 beside int8, Q4_0 beside int4.
"""

import json
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.model import Qwen2, load_model
from openqwen.model.quantize import PackedMatrix, QuantizedLinear
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import console
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.convert import convert
from openqwen.train.quantize import quantize

Kind = Literal["float32", "int8", "int4"]
Seconds = dict[str, float]

_PEER_TYPE: dict[str, Literal["f32", "q8_0", "q4_0"]] = {
    "float32": "f32",
    "int8": "q8_0",
    "int4": "q4_0",
}
_PREFILL, _WRITTEN = 1_024, 64
_TOGETHER, _PROMPT, _NEW = 16, 256, 128
_PEER = Path(__file__).with_name("peer_llama_cpp.py")
_CEILINGS = Path(__file__).with_name("ceilings.py")
_EDIT = (
    "Rename the variable `{old}` to `{new}` in this code, change nothing else, and say nothing "
    "else.\n\n{code}"
)


def bench(
    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="A Hugging Face folder, a .gguf file or a hub id.", metavar="MODEL"),
    ],
    peer: Annotated[
        Path | None,
        tyro.conf.arg(help="A Python that has llama-cpp-python; none: only OpenQwen is measured."),
    ] = None,
    kinds: Annotated[tuple[Kind, ...], tyro.conf.arg(help="Forms of the weights.")] = (
        "int8",
        "int4",
    ),
    rounds: Annotated[int, tyro.conf.arg(help="How often each is measured.")] = 3,
) -> None:
    """Print seconds and ratios."""
    ceilings = runpy.run_path(str(_CEILINGS))["measure"]()
    ours: dict[str, Seconds] = {}
    theirs: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            file, folder = Path(name) / f"{kind}.gguf", Path(name) / kind
            if kind == "float32":
                convert(model, folder)
            else:
                quantize(model, folder, to=kind)
            if peer:
                convert(model, file, type=_PEER_TYPE[kind])
            ours[kind], theirs[kind] = _in_turn(str(folder), kind, peer, file, rounds)
    console.print(_table(ours, theirs))
    for kind, mine in ours.items():
        console.print(_shares(kind, mine, ceilings))


def _in_turn(
    model: str, kind: Kind, peer: Path | None, file: Path, rounds: int
) -> tuple[Seconds, Seconds]:
    """Medians of ours and of the peer's, measured alternately."""
    started = statistics.median(_start(model) for _ in range(rounds))
    tokenizer, network = load_tokenizer(model), load_model(model)
    measures: list[Seconds] = []
    peers: list[Seconds] = []
    for seed in range(rounds):
        ids = Texts(tokenizer, seed)
        measures.append(_measure(network, tokenizer, ids))
        console.print(f"  {kind} {seed + 1} of {rounds}: " + _said(measures[-1]), markup=False)
        if peer:
            peers.append(_ask(peer, file, ids))
            console.print(f"  llama.cpp {_PEER_TYPE[kind]}: " + _said(peers[-1]), markup=False)
    medians = {name: statistics.median(m[name] for m in measures) for name in measures[0]}
    theirs = {name: statistics.median(p[name] for p in peers) for name in peers[0]} if peers else {}
    return medians | _work(network) | {"start": started}, theirs


def _work(model: Qwen2) -> Seconds:
    """Return the bytes of weights read per generated token, and the operations per prompt token."""
    config, head = (
        model.config,
        model.model.embed_tokens if model.lm_head is None else model.lm_head,
    )
    matrices = [
        m for m in model.modules() if isinstance(m, torch.nn.Linear | QuantizedLinear) or m is head
    ]
    stored = [m.packed if isinstance(m, PackedMatrix) else m.weight for m in matrices]
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return {
        "bytes": sum(x.nbytes for x in stored),
        "operations": 2 * (config.parameters() - tables),
    }


def _measure(model: Qwen2, tokenizer: Tokenizer, ids: "Texts") -> Seconds:
    engine = Engine(model, tokenizer, EngineConfig(prefix_cache=False))
    one = Sampling(max_tokens=_WRITTEN + 1, ignore_eos=True)
    engine.generate([ids.long[:64]], Sampling(max_tokens=1))  # warm
    read, written = _first_and_rest(engine, ids.long, one)
    many = Sampling(max_tokens=_NEW, ignore_eos=True)
    together = _timed(lambda: engine.generate(ids.prompts, many))
    cold, warm = _warmth(model, tokenizer, ids.long)
    edit = Sampling(max_tokens=256)
    plain = _timed(lambda: engine.generate(ids.edits, edit))
    drafting = Engine(model, tokenizer, EngineConfig(prefix_cache=False, speculate=8))
    guessed = _timed(lambda: drafting.generate(ids.edits, edit))
    return {
        "prefill": read,
        "token": written / _WRITTEN,
        "together": together,
        "cold": cold,
        "warm": warm,
        "edits": plain,
        "edits drafted": guessed,
    }


class Texts:
    """What is read: a long text, several that share nothing, and code to be edited."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        chosen = random.Random(seed)
        source = Path(json.__file__).parent
        code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("*.py")))
        ids = tokenizer.encode(code)

        def piece(length: int) -> list[int]:
            start = chosen.randrange(len(ids) - length)
            return ids[start : start + length]

        self.long = piece(_PREFILL)
        self.prompts = [piece(_PROMPT) for _ in range(_TOGETHER)]
        request = _EDIT.format(old="result", new="total", code=_FUNCTION)
        self.edits = [[{"role": "user", "content": request}]]


_FUNCTION = '''def merge(left, right):
    """Merge two sorted lists into one sorted list."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    result.extend(left[i:])
    result.extend(right[j:])
    return result
'''


def _first_and_rest(engine: Engine, ids: list[int], sampling: Sampling) -> tuple[float, float]:
    """Seconds to the first token, and for all after it."""
    start = time.perf_counter()
    request = engine.submit(ids, sampling)
    while not request.token_ids:
        engine.step()
    first = time.perf_counter()
    while request.finish_reason is None:
        engine.step()
    return first - start, time.perf_counter() - first


def _warmth(model: Qwen2, tokenizer: Tokenizer, ids: list[int]) -> tuple[float, float]:
    """Seconds to the first token of a question behind 1,000 tokens, unread and then read before."""
    engine, one = Engine(model, tokenizer), Sampling(max_tokens=1, ignore_eos=True)
    prefix = ids[:1_000]
    cold = _timed(lambda: engine.generate([prefix + ids[:20]], one))
    warm = _timed(lambda: engine.generate([prefix + ids[40:60]], one))
    return cold, warm


def _start(model: str) -> float:
    """Seconds from a new process to the first token of its first answer."""
    code = (
        "import sys, openqwen as oq\n"
        "engine = oq.Engine(oq.load_model(sys.argv[1]), oq.load_tokenizer(sys.argv[1]))\n"
        "next(engine.stream([{'role': 'user', 'content': 'Hello.'}], oq.Sampling(max_tokens=2, "
        "ignore_eos=True)))"
    )
    return _timed(lambda: subprocess.run([sys.executable, "-c", code, model], check=True))


def _ask(peer: Path, file: Path, texts: Texts) -> Seconds:
    job = {
        "model": str(file),
        "threads": torch.get_num_threads(),
        "prefill": texts.long,
        "prompts": texts.prompts,
        "written": _WRITTEN,
        "new": _NEW,
    }
    done = subprocess.run(
        [str(peer), str(_PEER)], input=json.dumps(job), capture_output=True, text=True
    )
    if done.returncode:
        raise OpenQwenError(
            f"The peer failed: {done.stderr.strip()[-500:]}",
            where=peer,
            do="install llama-cpp-python and numpy in its environment",
        )
    answer: Seconds = json.loads(done.stdout)
    return answer


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _said(seconds: Seconds) -> str:
    return ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())


def _shares(kind: Kind, mine: Seconds, ceilings: Any) -> str:
    """What was reached of the machine's ceilings (benchmarks/ceilings.py)."""
    read, done = mine["bytes"] / mine["token"], mine["operations"] * _PREFILL / mine["prefill"]
    found = [
        (
            f"{kind}: writing reads {read / 1e9:.1f} GB/s of weights",
            read,
            ceilings.bytes_read,
            1e9,
            "GB/s",
        )
    ]
    if kind != "float32":
        found.append(
            (f"prompts take {done / 1e9:.0f} GOP/s", done, ceilings.operations, 1e9, "GOP/s")
        )
    return "; ".join(
        what + (f", {rate / most:.0%} of {most / unit:.0f} {name}" if most else "")
        for what, rate, most, unit, name in found
    )


def _table(ours: dict[str, Seconds], theirs: dict[str, Seconds]) -> Table:
    """Rates and ratios; a ratio above 1 is ours being faster."""
    table = Table("", "weights", "ours", "llama.cpp", "ratio")
    tokens = _TOGETHER * (_PROMPT + _NEW)
    best = min((t["prefill"] for t in theirs.values() if t), default=None)
    for kind, mine in ours.items():
        other = theirs.get(kind) or {}
        rows = [
            (
                f"read {_PREFILL:,} tokens (peer: its best)",
                _PREFILL / mine["prefill"],
                best and _PREFILL / best,
            ),
            ("write, one request", 1 / mine["token"], other and 1 / other["token"]),
            (
                f"{_TOGETHER} requests, all tokens",
                tokens / mine["together"],
                other and tokens / other["together"],
            ),
        ]
        for what, rate, peer in rows:
            shown = (f"{peer:,.1f}", f"{rate / peer:.2f}×") if peer else ("", "")
            table.add_row(what, kind, f"{rate:,.1f} tokens/s", *shown)
        gain = mine["edits"] / mine["edits drafted"]
        table.add_row(
            "edits with drafts, against without",
            kind,
            f"{mine['edits drafted']:.2f} s",
            "",
            f"{gain:.2f}×",
        )
        gain = mine["cold"] / mine["warm"]
        table.add_row(
            "first token behind a warm prefix, against cold",
            kind,
            f"{mine['warm']:.3f} s",
            "",
            f"{gain:.1f}×",
        )
        table.add_row("start to first token", kind, f"{mine['start']:.1f} s", "", "")
    return table


if __name__ == "__main__":
    tyro.cli(bench)
