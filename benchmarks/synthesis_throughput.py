"""Answers a minute at 16 requests at once: our engine beside llama.cpp's server.

    python benchmarks/synthesis_throughput.py MODEL --tasks gsm8k_train.jsonl --peer llama-server

Both answer the same prompts, those of `openqwen synthesize rejection`, greedily and until the model
ends, so that both do the same work but for a few answers that rounding changes. They take turns,
`rounds` times, with other prompts each time; medians are printed. Ours runs in this process, as in
`synthesize`, with int8 weights; llama.cpp reads a Q8_0 file that is converted from the same model.

The peer is llama.cpp's own program `llama-server`, or a Python that has llama-cpp-python with its
[server] packages (`python -m llama_cpp.server`, which answers one request at a time).
"""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import httpx
import tyro
from rich.table import Table

from openqwen.engine import Endpoint, EngineConfig, Generator, Output, Sampling
from openqwen.engine.lanes import open_lane
from openqwen.engine.workers import EngineSource
from openqwen.instruct.synthesize.prompts import PromptFiles
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl
from openqwen.support.hub import local
from openqwen.support.progress import console
from openqwen.train.convert import convert

_START = 300.0  # seconds that the peer may take to load the model
Messages = list[dict[str, str]]


class Pace(NamedTuple):
    """What one side did in a round."""

    answers: int
    tokens: int
    cut: int
    seconds: float

    @property
    def per_minute(self) -> float:
        """Answers a minute."""
        return 60 * self.answers / self.seconds


def bench(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    tasks: Path,
    peer: Path | None = None,
    requests: int = 64,
    concurrency: int = 16,
    max_tokens: int = 256,
    rounds: int = 3,
    threads: int = os.cpu_count() or 1,
) -> None:
    """Print answers and tokens a minute, and the ratio.

    Args:
        model: A Hugging Face folder, a .gguf file or a hub id.
        tasks: Problems, JSON Lines with a field "question", such as GSM8K's file.
        peer: llama-server, or a Python that has llama-cpp-python; none: only ours is measured.
        requests: Prompts of a round.
        concurrency: Requests at once.
        max_tokens: Most tokens of an answer.
        rounds: How often each side is measured.
        threads: Of the peer; ours takes OMP_NUM_THREADS, or all.
    """
    prompts = load_prompts(tasks, (rounds + 1) * requests)
    sampling = Sampling(max_tokens=max_tokens)
    paces: dict[str, list[Pace]] = {}
    with ExitStack() as stack:
        sides: dict[str, Generator] = {}
        config = EngineConfig(max_running=concurrency)
        sides["OpenQwen, int8"] = EngineSource(local(model), "int8", config).load()
        if peer:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            convert(model, folder / "model.gguf", type="q8_0")
            url = stack.enter_context(served(peer, folder / "model.gguf", concurrency, threads))
            sides["llama.cpp, Q8_0"] = Endpoint(url, "model", concurrency=concurrency)
        for name, generator in sides.items():  # warm: files are mapped, not read
            pace(generator, prompts[:concurrency], sampling, concurrency)
            paces[name] = []
        for number in range(1, rounds + 1):
            part = prompts[number * requests : (number + 1) * requests]
            for name, generator in sides.items():
                found = pace(generator, part, sampling, concurrency)
                paces[name].append(found)
                said = f"{found.per_minute:,.1f} answers a minute, {found.tokens:,} tokens"
                console.print(f"  {number} of {rounds}, {name}: {said}", markup=False)
    console.print(table(paces))


def load_prompts(tasks: Path, count: int) -> list[Messages]:
    """The prompts that rejection sampling asks first, for so many problems."""
    files = PromptFiles("rejection")
    prompts: list[Messages] = []
    for record in read_jsonl(tasks):
        prompts.append(files.messages("solve", "en", {"question": record["question"]})[1])
        if len(prompts) == count:
            return prompts
    do = "take fewer requests or rounds"
    raise OpenQwenError(f"There are {len(prompts)} problems; {count} are needed.", tasks, do)


def pace(
    generator: Generator, prompts: Sequence[Messages], sampling: Sampling, concurrency: int
) -> Pace:
    """Ask all prompts, `concurrency` at once, and time it."""
    waiting, outputs = list(enumerate(prompts)), list[Output]()
    with open_lane(generator) as lane:
        start = time.perf_counter()
        while waiting or lane.open:
            while waiting and lane.open < concurrency:
                number, prompt = waiting.pop(0)
                lane.submit(number, prompt, sampling, number)
            for _, answer in lane.wait():
                if isinstance(answer, OpenQwenError):
                    raise answer
                outputs.append(answer)
        seconds = time.perf_counter() - start
    # A server that returns no ids returns log-probabilities, one for each token.
    tokens = sum(len(output.token_ids) or len(output.logprobs) for output in outputs)
    cut = sum(output.finish_reason == "length" for output in outputs)
    return Pace(len(outputs), tokens, cut, seconds)


@contextmanager
def served(peer: Path, file: Path, concurrency: int, threads: int) -> Iterator[str]:
    """The base URL of llama.cpp's server with the file, which runs within the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = ["--host", "127.0.0.1", "--port", port, "--model", str(file)]
    room = str(2_048 * concurrency)  # of all requests together
    if "python" in peer.name:
        words = [str(peer), "-m", "llama_cpp.server", *place, "--n_ctx", room]
        words += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    else:
        words = [str(peer), *place, "--ctx-size", room, "--parallel", str(concurrency)]
        words += ["--threads", str(threads), "--threads-batch", str(threads)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + _START
    try:
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end:
                what = "The peer does not serve."
                raise OpenQwenError(what, peer, f"try it by hand: {' '.join(words)}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


def table(paces: dict[str, list[Pace]]) -> Table:
    """Medians of all rounds; the ratio is to the first row's."""
    made = Table("", "answers a minute", "tokens a second", "cut off", "ours is faster by")
    ours = 0.0
    for name, rounds in paces.items():
        rate = median(one.per_minute for one in rounds)
        ours = ours or rate
        tokens = median(one.tokens / one.seconds for one in rounds)
        cut = sum(one.cut for one in rounds) / sum(one.answers for one in rounds)
        ratio = "" if rate == ours else f"{ours / rate:.2f}×"
        made.add_row(name, f"{rate:,.1f}", f"{tokens:,.1f}", f"{cut:.0%}", ratio)
    return made


if __name__ == "__main__":
    tyro.cli(bench)
