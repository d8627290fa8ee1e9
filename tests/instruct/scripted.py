"""Generators for tests of synthesis, and a small method."""

import hashlib
import json
from pathlib import Path

from openqwen.engine import Output, Sampling
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.method import Item, Method, assistant
from openqwen.instruct.synthesize.prompts import PromptFiles
from openqwen.instruct.synthesize.runner import Synthesis
from openqwen.sandbox import Program

DEFAULT = SynthesisConfig()


def number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Scripted:
    """answer: (prompt as text, seed) -> text, an Output, or an exception to raise."""

    def __init__(self, answer):
        self.answer, self.asked, self.sampled = answer, [], []

    def generate(self, prompts, sampling=None, seeds=None, progress=None):
        assert isinstance(sampling, Sampling)
        outputs = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = "\n".join(m["content"] for m in prompt)
            self.asked.append((text, seed))
            self.sampled.append(sampling)
            said = self.answer(text, seed)
            if isinstance(said, BaseException):
                raise said
            outputs.append(said if isinstance(said, Output) else Output(said, finish_reason="stop"))
        return outputs


class Guess(Method):
    """Several answers to each number, then a second look at those that are even."""

    name = "rejection"  # its prompts

    def __init__(self, config, count):
        super().__init__(config)
        self.count = count

    def items(self):
        for n in range(self.count):
            yield Item(f"n/{n}", n, "seven is no number" if n == 7 else "")

    def steps(self, item, work):
        asked = work.messages("solve", question=f"number {item.data}")
        outputs = yield from work.ask([asked] * 3, Sampling(max_tokens=9, temperature=1.0))
        texts = [o.text for o in outputs if work.gate("ended", o.finish_reason == "stop")]
        even = [t for t in texts if work.gate("even", t[-1:] in "02468", f"odd: {item.id}", t)]
        looks = yield from work.ask(
            [work.messages("judge", question=item.id, solution=t) for t in dict.fromkeys(even)],
            Sampling(),
        )
        runs = yield from work.run([Program(f"print({item.data})")] if item.data % 20 == 0 else [])
        for text, look in zip(dict.fromkeys(even), looks):
            work.demonstration([*asked, assistant(text)], look=look.text, runs=len(runs))
        for text, look in zip(even, looks[1:]):
            work.preference(asked, text, look.text)
        if int(work.rng.integers(4)) == 0:
            work.refuse("drawn: by lot")


def said(text, seed):
    """An answer of numbers, as long as it happens to be."""
    n = number(text, seed)
    return "7 " * (n % 5) + str(n % 1000)


def run(place: Path, generator, config=DEFAULT, method=None, seed=1, **others):
    """(counts, the bytes of each result) of a run whose state is in `place`."""
    output = place / "output"
    if output.exists():
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        output.rmdir()
    output.mkdir(parents=True)
    generators = {name: (g, name, name) for name, g in {"model": generator, **others}.items()}
    generators.setdefault("judge", generators["model"])
    method = method or Guess(config, 40)
    reward = getattr(config, "reward", None)
    counts = Synthesis(method, generators, config, seed, output, place / "scratch", reward).run()
    return counts, results(output)


def results(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(output.iterdir()) if p.is_file()}


def records(found: dict[str, bytes], name: str) -> list[dict]:
    return [json.loads(line) for line in found[f"{name}.jsonl"].splitlines()]


def prompt_digest(method: str, name: str) -> str:
    return PromptFiles(method).digests[name]
