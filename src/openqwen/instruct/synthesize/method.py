"""What a method of synthesis is: items, and for each item a few steps from requests to records.

    class Echo(Method):
        name = "echo"

        def items(self):
            for task in ...:
                yield Item(task.id, task)

        def steps(self, item, work):
            asked = work.messages("ask", question=item.data.question)  # prompts/echo/ask.en.jinja
            outputs = yield from work.ask([asked] * 4, Sampling(temperature=1.0))
            grades = yield from work.grade([item.data] * 4, [o.text for o in outputs])
            for output, grade in zip(outputs, grades):
                if work.gate("right", grade.passed):
                    work.demonstration([*asked, assistant(output.text)])

The steps of many items run side by side (runner.py). They share nothing but what `prepare` made, so
that an item's records depend on the item, the seed and the generators alone.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from openqwen.engine import Output, Prompt, Sampling
from openqwen.instruct.synthesize.journal import ModelCall
from openqwen.instruct.synthesize.prompts import PromptFiles
from openqwen.sandbox import Program, Verdict
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import parse_json
from openqwen.support.generators import Generators
from openqwen.tasks import Grade, Task
from openqwen.tasks.graders import check_task

T = TypeVar("T")
_SHOWN = 2_000  # characters of a text in the quarantine
Message = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Work of a kind that is cheaper for many at once: "grade", "run" or "reward"."""

    kind: str
    inputs: Sequence[Any]


Step = list[ModelCall] | Batch
Steps = Generator[Step, list[Any], T]


@dataclass(frozen=True)
class Item:
    """One input of a method: a problem, a document, a constraint.

    Args:
        id: the parent of what is made from it; unique in a run.
        data: what the method reads.
        fault: why it cannot be used; such an item goes to the quarantine.
    """

    id: str
    data: Any
    fault: str = ""


class Method(ABC):
    """A way to make demonstrations D and preferences P.

    Args:
        config: its settings.

    Class attributes:
        name: in `origin`, and the folder of its prompts.
        files: the kinds of records that it makes, each a file of that name.
    """

    name: str
    files: tuple[str, ...] = ("demonstrations", "preferences")

    def __init__(self, config: Any):
        self.config = config

    def prepare(self, work: "Work") -> Steps[None]:
        """Steps before the first item. What they learn may be kept in attributes."""
        yield from ()

    @abstractmethod
    def items(self) -> Iterable[Item]:
        """The items, streamed, in the same order each time. Called after `prepare`."""

    @abstractmethod
    def steps(self, item: Item, work: "Work") -> Steps[None]:
        """Make records of one item: yield from `work.ask`, `work.grade`, `work.run`.

        An OpenQwenError ends the item: it goes to the quarantine without records.
        """


@dataclass
class Work:
    """What the steps of one item use, and what they made.

    Args:
        item: its identity.
        seed: of the run.
        prompts: the method's prompt files.
        language: of the prompts, unless a call names another.
        origin: of the records: method, model, seed.
        records: made so far: (file, record), where the file is one of the method's `files`.
        gates: name -> [passed, tried].
        quarantine: what was refused, and why.
        failures: calls that were not answered.
        calls: made so far.
        tokens: of their prompts and answers.
    """

    item: str
    seed: int
    prompts: PromptFiles
    language: str
    origin: dict[str, Any]
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    gates: dict[str, list[int]] = field(default_factory=dict)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    calls: int = 0
    tokens: int = 0
    _rendered: dict[str, str] = field(default_factory=dict)
    _asked: Counter[str] = field(default_factory=Counter)

    def messages(self, name: str, language: str | None = None, **values: Any) -> list[Message]:
        """A prompt file with values filled in, as chat messages; `origin` will hold its hash."""
        chosen, messages = self.prompts.messages(name, language or self.language, values)
        self._rendered[chosen] = self.prompts.digests[chosen]
        return messages

    def ask(
        self, prompts: Sequence[Prompt], sampling: Sampling, by: str = "model"
    ) -> Steps[list[Output]]:
        """Ask the model (or "judge"), each prompt with a seed of its own; one output each.

        The n-th time that an item asks a prompt has the n-th seed of that prompt. An output's
        finish_reason is "stop", or "length" where it did not end, or "error" with an empty text
        where no answer came; its log-probabilities and prompt ids are empty.
        """
        calls = []
        for prompt in prompts:
            text = json.dumps([by, prompt], sort_keys=True, default=str)
            name = f"{self.seed}/{self.item}/{text}/{self._asked[text]}"
            self._asked[text] += 1
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1
            calls.append(ModelCall(prompt, sampling, seed, by))
        return (yield calls) if calls else []

    def grade(self, tasks: Sequence[Task], answers: Sequence[str]) -> Steps[list[Grade]]:
        """Grade answers; see `tasks.grade`."""
        for task in tasks:
            check_task(task, f"item {self.item}")
        return (yield Batch("grade", list(zip(tasks, answers, strict=True)))) if tasks else []

    def run(self, programs: Sequence[Program]) -> Steps[list[Verdict]]:
        """Run programs in the sandbox."""
        return (yield Batch("run", list(programs))) if programs else []

    def reward(self, conversations: Sequence[list[Message]]) -> Steps[list[float]]:
        """Score conversations by the run's reward model."""
        return (yield Batch("reward", list(conversations))) if conversations else []

    def gate(self, name: str, passed: bool, reason: str = "", text: str = "") -> bool:
        """Count a candidate at a gate; returns `passed`.

        Where a reason is given, a candidate that does not pass goes to the quarantine.
        """
        counts = self.gates.setdefault(name, [0, 0])
        counts[0] += passed
        counts[1] += 1
        if not passed and reason:
            self.refuse(f"{name}: {reason}", text)
        return passed

    def refuse(self, reason: str, text: str = "") -> None:
        """Put something into the quarantine."""
        entry = {"item": self.item, "reason": reason[:_SHOWN]}
        self.quarantine.append(entry | ({"text": text[:_SHOWN]} if text else {}))

    def demonstration(self, messages: Sequence[Message], **origin: Any) -> None:
        """Add a record to D. origin: more than method, model, seed, parents and prompts."""
        self.record("demonstrations", {"messages": list(messages)}, **origin)

    def preference(
        self, prompt: Sequence[Message], chosen: str, rejected: str, **origin: Any
    ) -> None:
        """Add a record to P."""
        sides = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        self.record("preferences", {"prompt": list(prompt), **sides}, **origin)

    def record(self, name: str, record: dict[str, Any], **origin: Any) -> None:
        """Add a record to one of the method's files; see `demonstration`."""
        made = self.origin | {"parents": [self.item], "prompts": dict(self._rendered)} | origin
        record["origin"] = made
        try:
            parse_json(json.dumps(record))
        except ValueError as error:
            self.refuse(f"the record is no JSON: {error}")
            return
        self.records.append((name, record))

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this item."""
        return Generators(self.seed)[f"item/{self.item}"]


def assistant(text: str) -> Message:
    """An answer as a chat message."""
    return {"role": "assistant", "content": text}


def item_error(error: OpenQwenError) -> str:
    """An error on one line, for the quarantine."""
    where = f" ({error.where})" if error.where else ""
    return f"{error.what}{where}"
