"""Asks a model: generated answers and log-likelihoods of continuations, each kept once it is known.

An answer is found again by the model's digest, the prompt and the sampling. So a run that was
killed continues where it was, and a second one asks nothing.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

from openqwen.engine import Engine, Generator, Output, Prompt, Sampling
from openqwen.engine.lanes import open_lane
from openqwen.engine.workers import EngineWorkers
from openqwen.model import LongContext
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import parse_json
from openqwen.support.progress import Progress
from openqwen.tasks import GradeCache, GraderModel
from openqwen.tokenizer import Tokenizer

_PART = 1_024  # most prompts that are queued at once
_GREEDY = asdict(Sampling())


@dataclass(frozen=True)
class Reply:
    """What a model gave: a text, or the log-probabilities of a continuation's tokens."""

    text: str = ""
    tokens: int = 0
    finish_reason: str = "stop"
    logprobs: Sequence[float] = field(default=())


class ReplyCache:
    """Replies in a file of JSON Lines, which only grows; a line that a kill tore is skipped."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._replies: dict[str, Reply] = {}
        self._path = path
        self._torn = False
        if path.exists():
            data = path.read_bytes()
            self._torn = bool(data) and not data.endswith(b"\n")
            for line in data.split(b"\n"):
                try:
                    record = parse_json(line)
                    key = record.pop("key")
                    self._replies[key] = Reply(**record)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue

    def get(self, key: str) -> Reply | None:
        """The reply of that key, if it is known."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. One that ended in an error is forgotten with this object."""
        self._replies[key] = reply
        if reply.finish_reason == "error":
            return
        line = json.dumps({"key": key} | asdict(reply), ensure_ascii=False) + "\n"
        # One write for each line: another run may append to the same file.
        with disk_errors(self._path), open(self._path, "ab", buffering=0) as file:
            file.write(("\n" * self._torn + line).encode())
        self._torn = False


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated.

    Args:
        load: makes the generator, when a question is asked that is not known; engines of ours
            compute the common beginnings of prompts once.
        tokenizer: the model's; None where a server alone knows it.
        identity: a digest of the weights, or the URL and the name at a server.
        cache: what it answered before.
        grades: how such answers were graded before.
        judges: the models that grade answers, by the names that graders know.
    """

    load: Callable[[], Generator]
    tokenizer: Tokenizer | None
    identity: str
    cache: ReplyCache
    grades: GradeCache | None = None
    judges: Mapping[str, GraderModel] = field(default_factory=dict)

    @cached_property
    def generator(self) -> Generator:
        """What answers; loaded when it is first used."""
        return self.load()

    @cached_property
    def longest(self) -> float:
        """Most tokens of prompt and answer; a server alone knows its own limit."""
        return getattr(self.generator, "longest", math.inf)

    def close(self) -> None:
        """End the worker processes of the generator, if it has any."""
        if "generator" in self.__dict__ and isinstance(self.generator, EngineWorkers):
            self.generator.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Progress,
        sizes: Sequence[int] | None = None,
    ) -> list[Reply]:
        """Answer prompts, in order; those that are known are not asked again.

        A prompt that leaves no room for an answer gets an empty one with the reason "length".
        sizes: by how much each prompt advances the progress; None: by 1.
        """
        steps = sizes or [1] * len(prompts)
        greedy = sampling.greedy
        settings = {k: v for k, v in asdict(sampling).items() if v != _GREEDY[k]}
        keys = [
            self._key("generate", prompt, settings, None if greedy else seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        missing = self._missing(keys, progress, steps)
        for index in [i for i in missing if len(prompts[i]) >= self.longest]:
            missing.remove(index)
            self.cache.put(keys[index], Reply(finish_reason="length"))
            progress.advance(steps[index])
        missing.sort(key=lambda i: json.dumps(prompts[i]))  # common beginnings follow each other
        for index, output in self._answers(missing, lambda i: (prompts[i], sampling, seeds[i])):
            reply = Reply(output.text, len(output.token_ids), output.finish_reason or "error")
            self.cache.put(keys[index], reply)
            progress.advance(steps[index])
        return [self._known(key) for key in keys]

    def likelihoods(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        progress: Progress,
        way: LongContext | None = None,
    ) -> list[Reply]:
        """Score continuations after contexts (token ids); the beginning of a long one is cut.

        way: how they are read; None: as the engine decides by their length.
        """
        more = [] if way is None else [repr(way)]
        keys = [self._key("score", *pair, *more) for pair in pairs]
        missing = self._missing(keys, progress, [1] * len(pairs))
        missing.sort(key=lambda i: pairs[i])  # common beginnings follow each other
        for index, logprobs in self._scores(missing, pairs, progress, way):
            # An impossible token has −∞, which JSON cannot hold.
            finite = [max(-1e9, value) for value in logprobs]
            self.cache.put(keys[index], Reply(logprobs=finite))
        return [self._known(key) for key in keys]

    def check(self, name: str, prompt: str | list[dict[str, Any]], choices: bool) -> None:
        """Raise OpenQwenError where a benchmark cannot be asked: no tokenizer, or no template."""
        begun = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        if self.tokenizer is None and (choices or begun):
            why = "compares likelihoods" if choices else "begins the answer of the assistant"
            what = f"'{name}' {why}, which needs the tokenizer of the model."
            raise OpenQwenError(what, do="give a MODEL whose tokenizer is here")
        if self.tokenizer is not None and not (isinstance(prompt, str) or self.tokenizer.template):
            what = f"'{name}' asks in a chat, and this model's tokenizer has no chat template."
            do = "ask benchmarks that continue a text, such as those named -base, or use an "
            do += "instruct model, or put a chat_template.jinja into the model's folder"
            raise OpenQwenError(what, do=do)
        self.prompt(prompt)

    def prompt(self, prompt: str | list[dict[str, Any]]) -> Prompt:
        """The prompt as ids of the model's tokenizer, or as it is for a server without one."""
        if self.tokenizer is None:
            return prompt
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        opened = prompt[-1]["role"] == "assistant"
        ids, _ = self.tokenizer.encode_chat(prompt, not opened, continue_final_message=opened)
        return ids

    def tokens(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """The tokens of a prompt; see `check` for a model without a tokenizer."""
        ids = self.prompt(prompt)
        assert self.tokenizer is not None
        return cast(list[int], ids)

    def _key(self, *parts: Any) -> str:
        text = json.dumps([self.identity, *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _missing(self, keys: Sequence[str], progress: Progress, steps: Sequence[int]) -> list[int]:
        """The first place of each key that is not known; the others count as done."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            if self.cache.get(key) is None:
                first.setdefault(key, place)
        progress.skip(sum(steps) - sum(steps[place] for place in first.values()))
        return list(first.values())

    def _scores(
        self,
        missing: list[int],
        pairs: Sequence[tuple[list[int], list[int]]],
        progress: Progress,
        way: LongContext | None,
    ) -> Iterator[tuple[int, Sequence[float]]]:
        """Score the pairs of these indices; an engine of ours packs them, the others are asked."""
        if missing and way is None and isinstance(engine := self.generator, Engine):
            for start in range(0, len(missing), _PART):
                part = missing[start : start + _PART]
                cut = [fitted(*pairs[i], engine.longest - 1) for i in part]
                found = engine.score_continuations(cut, progress)
                yield from zip(part, (one.logprobs for one in found), strict=True)
            return

        def request(index: int) -> tuple[Prompt, Sampling, int]:
            context, continuation, first = *pairs[index], 0
            if self.longest < math.inf:
                context, continuation = fitted(context, continuation, int(self.longest) - 1)
                first = len(context)  # what is before it may come from the prefix cache
            sampling = Sampling(
                max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=first, long_context=way
            )
            return [*context, *continuation], sampling, 0

        for index, output in self._answers(missing, request):
            yield index, output.prompt_logprobs[-len(pairs[index][1]) :]
            progress.advance()

    def _answers(
        self, indices: list[int], request: Callable[[int], tuple[Prompt, Sampling, int]]
    ) -> Iterator[tuple[int, Output]]:
        """Ask what `request` says for each index; yield its answer when it ends."""
        if not indices:  # then no model is loaded
            return
        most, waiting = getattr(self.generator, "concurrency", _PART), iter(indices)
        with open_lane(self.generator) as lane:
            while True:
                for index in islice(waiting, most - lane.open):
                    lane.submit(index, *request(index))
                if not lane.open:
                    return
                for index, answer in lane.wait():
                    if isinstance(answer, OpenQwenError):
                        raise answer
                    yield index, answer

    def _known(self, key: str) -> Reply:
        reply = self.cache.get(key)
        assert reply is not None
        return reply


def fitted(context: list[int], continuation: list[int], room: int) -> tuple[list[int], list[int]]:
    """The pair within `room` tokens: the beginning of the context is cut, as in lm-eval."""
    kept = max(1, room - len(continuation))
    return context[-kept:], continuation[-(room - 1) :]


def split_pair(tokenizer: Tokenizer, context: str, text: str) -> tuple[list[int], list[int]]:
    """(ids of a context, ids of its continuation), as they are in the whole text.

    Spaces at the end of the context go to the continuation, whose first token they are part of
    (lm-evaluation-harness, `_encode_pair`).
    """
    bare = context.rstrip()
    text = context[len(bare) :] + text
    before, whole = tokenizer.encode(bare), tokenizer.encode(bare + text)
    if not before:
        return [tokenizer.endoftext_id], whole
    first = min(len(before), len(whole) - 1)
    return whole[:first], whole[first:]
