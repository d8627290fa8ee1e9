"""The `synthesize constitution` method: constitutional feedback (Qwen2 report, section 4.1).

For each question and principle: an answer that complies, one that deviates, and a plain answer that
the model criticises and revises (Constitutional AI, Bai et al. 2022). A judge scores all of them by
the principle. The best compliant answer goes to D, and against the deviating ones to P.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from openqwen.engine import Output
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import DATA, Question, questions
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig, judged
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.stage import Stage, StageRun


class ConstitutionConfig(AnswersConfig):
    """Which principles are put to which questions."""

    questions: Path | None = Field(
        None, description="a file of prompts or conversations whose questions are asked"
    )
    principles: Path | None = Field(
        None, description="a YAML file of principles in place of the shipped constitution"
    )
    categories: list[str] = Field(
        [], description="categories of principles that are used; none: all of them"
    )
    probes: int = Field(4, ge=0, description="questions that the model writes for each principle")
    per_question: int = Field(1, ge=1, description="principles drawn for each given question")
    comply: float = Field(8, ge=0, le=10, description="lowest score of an answer that complies")
    deviate: float = Field(3, ge=0, le=10, description="highest score of one that deviates")


class Principle:
    """What an answer does, and what one that breaks the principle does.

    Raises OpenQwenError where the entry of the file lacks a field or the language.
    """

    def __init__(self, entry: Any, language: str, where: str):
        try:
            self.id, self.category = str(entry["id"]), str(entry["category"])
            self.follow, self.avoid = str(entry["follow"][language]), str(entry["avoid"][language])
        except (KeyError, TypeError, IndexError):
            what = f"This principle needs id, category, follow.{language} and avoid.{language}."
            raise OpenQwenError(what, where, "see the shipped constitution.yaml") from None

    @property
    def texts(self) -> dict[str, str]:
        """The values of prompts."""
        return {"follow": self.follow, "avoid": self.avoid}


def read_principles(path: Path | None, language: str, categories: list[str]) -> list[Principle]:
    """The principles of a file, or the shipped ones, of some categories or of all.

    Raises:
        OpenQwenError: the file is no list of principles, two have one id, or none is left.
    """
    path = path or DATA / "constitution.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OpenQwenError(f"The principles cannot be read: {error}", path) from None
    entries = entries if isinstance(entries, list) else []
    every = [Principle(e, language, f"{path}, principle {n}") for n, e in enumerate(entries, 1)]
    known = sorted({principle.category for principle in every})
    for name in categories:
        if name not in known:
            do = f"use one of: {', '.join(known)}"
            raise OpenQwenError(f"There is no category '{name}'.", path, do)
    if len({principle.id for principle in every}) < len(every):
        raise OpenQwenError("Two principles have the same id.", path, "give each its own")
    chosen = [one for one in every if not categories or one.category in categories]
    if not chosen:
        raise OpenQwenError("There are no principles.", path, "see the shipped constitution.yaml")
    return chosen


class Constitution(Method):
    """One item a question with a principle."""

    name = "constitution"

    def __init__(self, config: ConstitutionConfig, seed: int):
        super().__init__(config)
        self.principles = read_principles(config.principles, config.language, config.categories)
        self.questions = questions(config.questions) if config.questions else []
        if not self.questions and not config.probes:
            do = "give --questions FILE, or --probes above 0"
            raise OpenQwenError("There are no questions.", "constitution", do)
        self.seed = seed
        self.probes: list[tuple[Question, Principle]] = []

    def prepare(self, work: Work) -> Steps[None]:
        """Let the model write questions that put each principle to the test."""
        count = self.config.probes
        every = self.principles if count else []
        prompts = [work.messages("probe", **principle.texts, count=count) for principle in every]
        outputs = yield from work.ask(prompts, self.config.free)
        for principle, output in zip(every, outputs):
            found = reading.items(output.text)[:count]
            work.gate("has probes", bool(found), "no list of questions", output.text)
            for number, text in enumerate(found):
                question = Question(f"probe/{principle.id}/{number}", text)
                self.probes.append((question, principle))

    def items(self) -> Iterable[Item]:
        """The probes, and the given questions with drawn principles."""
        for question, principle in self.probes:
            yield Item(question.id, (question.text, principle))
        for question in self.questions:
            order = Generators(self.seed)[f"principles/{question.id}"]
            for n in order.permutation(len(self.principles))[: self.config.per_question]:
                principle = self.principles[n]
                yield Item(f"{question.id}/{principle.id}", (question.text, principle))

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Answers of each kind, judged; the best and the worst become records."""
        question, principle = item.data
        asked = [{"role": "user", "content": question}]
        texts = {"question": question, **principle.texts}
        prompts = [work.messages(n, **texts) for n in ("comply", "deviate")]
        complied, deviated, plain = yield from work.ask([*prompts, asked], self.config.free)
        answers = {"comply": complied, "deviate": deviated, "plain": plain}
        if not reading.fault(plain):
            answers["revise"] = yield from self._revised(plain.text.strip(), texts, work)
        usable = {
            kind: output.text.strip()
            for kind, output in answers.items()
            if work.gate(f"{kind}: usable", not reading.fault(output, (question,)))
        }
        prompts = [work.messages("judge", **texts, response=text) for text in usable.values()]
        scores = yield from judged(work, prompts, self.config)
        self._record(asked, usable, dict(zip(usable, scores)), work, principle)

    def _revised(self, plain: str, texts: dict[str, str], work: Work) -> Steps[Output]:
        """The revision of a plain answer after a critique."""
        prompt = work.messages("critique", **texts, response=plain)
        (critique,) = yield from work.ask([prompt], self.config.free)
        if fault := reading.fault(critique):
            work.refuse(f"critique: {fault}", critique.text)
            return Output(finish_reason="error")
        prompt = work.messages("revise", **texts, response=plain, critique=critique.text.strip())
        (revised,) = yield from work.ask([prompt], self.config.free)
        return revised

    def _record(
        self,
        asked: list[Message],
        usable: dict[str, str],
        scores: dict[str, float | None],
        work: Work,
        principle: Principle,
    ) -> None:
        """D of the best answer that complies; P of it against those that deviate."""
        good, bad = {}, []
        for kind, score in scores.items():
            complies = score is not None and score >= self.config.comply
            deviates = score is not None and score <= self.config.deviate
            if kind == "deviate":
                work.gate("deviate: judged to deviate", deviates)
            elif work.gate(f"{kind}: judged to comply", complies):
                good[kind] = score
            if deviates and kind in ("deviate", "plain"):
                bad.append(kind)
        if not good:
            return
        # Of equal scores the revision goes first: it has seen a critique.
        rank = ["plain", "comply", "revise"]
        best = max(good, key=lambda kind: (good[kind], rank.index(kind)))
        origin = {"principle": principle.id, "category": principle.category, "answer": best}
        work.demonstration([*asked, assistant(usable[best])], **origin, score=good[best])
        for kind in bad:
            if usable[kind] != usable[best]:
                work.preference(asked, usable[best], usable[kind], **origin, against=kind)


def run_constitution(run: StageRun) -> dict[str, float]:
    """Principles and questions → demonstrations D and preferences P."""
    return synthesize(Constitution(run.config, run.seed), run)


STAGE = Stage(
    name="synthesize-constitution",
    help="Answers that keep to principles, and that break them, become D and P.",
    config=ConstitutionConfig,
    inputs={},
    outputs=["demonstrations", "preferences"],
    run=run_constitution,
)
