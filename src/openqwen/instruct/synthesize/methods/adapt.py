"""The `synthesize adapt` method: conversations in another language, or under a system prompt.

Qwen2.5 report, section 4.1:
    language   cross-lingual transfer: the question is translated and answered anew; the answer must
               be in that language and agree with the original one
    system     robustness to system prompts: the answer is written anew under a drawn system prompt,
               which it must keep to
"""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import Exchange, exchanges, phrases
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig, judged, shown
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.records import count_records
from openqwen.support.stage import DEMONSTRATIONS, Stage, StageRun

# The first words of the Unicode names of a language's letters; all others are written in Latin.
_SCRIPTS = {
    "chinese": "CJK",
    "japanese": "CJK HIRAGANA KATAKANA",
    "korean": "HANGUL",
    "russian": "CYRILLIC",
    "ukrainian": "CYRILLIC",
    "arabic": "ARABIC",
    "persian": "ARABIC",
    "hebrew": "HEBREW",
    "greek": "GREEK",
    "hindi": "DEVANAGARI",
    "thai": "THAI",
}


class AdaptConfig(AnswersConfig):
    """What becomes of conversations."""

    form: Literal["language", "system"] = Field("language", description="what is changed")
    target: str = Field(
        "Chinese", pattern="^[A-Z]", description="the language, by its English name: French"
    )
    system_prompts: Path | None = Field(
        None, description="system prompts, one a line, in place of the shipped ones"
    )
    rounds: int = Field(10, ge=0, description="requests for new system prompts; 0 keeps the given")
    per_round: int = Field(20, ge=1, description="system prompts asked for in each request")
    samples: int = Field(4, ge=1, description="new answers to each question")
    consistent: float = Field(8, ge=0, le=10, description="lowest score of a kept answer")
    inconsistent: float = Field(4, ge=0, le=10, description="highest score of a rejected one")


class Adapt(Method):
    """One item a conversation."""

    name = "adapt"

    def __init__(self, config: AdaptConfig, source: Path):
        super().__init__(config)
        self.source = source
        self.systems: list[str] = []
        if config.form == "system":
            self.systems = phrases("system_prompts", config.language, config.system_prompts)

    def prepare(self, work: Work) -> Steps[None]:
        """Let the model write more system prompts in the manner of those that are given."""
        rounds = self.config.rounds if self.config.form == "system" else 0
        prompts = []
        for _ in range(rounds):
            seeds = [self.systems[n] for n in work.rng.permutation(len(self.systems))[:8]]
            prompts.append(work.messages("expand", seeds=seeds, count=self.config.per_round))
        known = reading.Novelty(0.7, self.systems)
        for output in (yield from work.ask(prompts, self.config.free)):
            for text in reading.items(output.text):
                if work.gate("is a new system prompt", len(text) <= 500 and known.add(text)):
                    self.systems.append(text)

    def items(self) -> Iterable[Item]:
        """The conversations of the file."""
        return exchanges(self.source)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Change the question or its system prompt, and answer anew."""
        if self.config.form == "language":
            yield from self._translate(item.data, work)
        else:
            yield from self._instruct(item.data, work)

    def _translate(self, exchange: Exchange, work: Work) -> Steps[None]:
        target, question = self.config.target, exchange.question
        if len([m for m in exchange.prompt if m["role"] != "system"]) > 1:
            work.refuse("a conversation of several turns")
            return
        prompt = work.messages("translate", text=question, target=target)
        (output,) = yield from work.ask([prompt], self.config.free)
        fault = reading.fault(output, (question,)) or foreign(output.text, target)
        if not fault and not any(map(str.isalpha, output.text)):
            fault = "no words"
        if not work.gate("translation is usable", not fault, fault, output.text):
            return
        translated = output.text.strip()
        values = {"question": question, "original": exchange.answer, "target": target}
        asked = [{"role": "user", "content": translated}]
        yield from self._answer(asked, "align", values, [], target, work)

    def _instruct(self, exchange: Exchange, work: Work) -> Steps[None]:
        system = self.systems[int(work.rng.integers(len(self.systems)))]
        rest = [message for message in exchange.prompt if message["role"] != "system"]
        asked = [{"role": "system", "content": system}, *rest]
        values = {"system": system, "question": exchange.question}
        yield from self._answer(asked, "consistent", values, [exchange.answer], "", work)

    def _answer(
        self,
        asked: list[Message],
        judge: str,
        values: dict[str, str],
        others: Sequence[str],
        target: str,
        work: Work,
    ) -> Steps[None]:
        """Sample answers, judge them and the others, and make records of the best and the worst."""
        config = self.config
        outputs = yield from work.ask([asked] * config.samples, config.free)
        texts = []
        for output in outputs:
            fault = reading.fault(output, (values["question"],))
            fault = fault or (foreign(output.text, target) if target else "")
            if work.gate("answer is usable", not fault, fault, output.text):
                texts.append(output.text.strip())
        texts = list(dict.fromkeys(texts))
        every = [*texts, *(text for text in others if text not in texts)] if texts else []
        prompts = [work.messages(judge, **values, response=text) for text in every]
        scores = dict(zip(every, (yield from judged(work, prompts, config))))
        good = []
        for text in texts:
            fits = (scores[text] or 0) >= config.consistent
            if work.gate("answer is consistent", fits, shown(scores[text]), text):
                good.append(text)
        if not good:
            return
        best = max(good, key=lambda text: scores[text] or 0)
        work.demonstration([*asked, assistant(best)], form=config.form, score=scores[best])
        known = [(score, text) for text, score in scores.items() if score is not None]
        score, worst = min(known)
        if score <= config.inconsistent:
            work.preference(asked, best, worst, form=config.form, rejected_score=score)


def foreign(text: str, target: str) -> str:
    """Why a text is not in a language, as far as its letters tell; "" where they are its own."""
    scripts = _SCRIPTS.get(target.split()[-1].casefold(), "LATIN").split()
    letters = [unicodedata.name(c, "?").split()[0] for c in text[:5_000] if c.isalpha()]
    own = sum(script in scripts for script in letters)
    return "" if own >= len(letters) / 2 else f"not written in {target}"


def run_adapt(run: StageRun) -> dict[str, float]:
    """Demonstrations → others in a language or under system prompts, and preferences P."""
    source = run.data("demonstrations")
    return synthesize(Adapt(run.config, source), run, count_records(source))


STAGE = Stage(
    name="synthesize-adapt",
    help="Conversations in another language, or under a system prompt, become D and P.",
    config=AdaptConfig,
    inputs={"demonstrations": DEMONSTRATIONS},
    outputs=["demonstrations", "preferences"],
    run=run_adapt,
)
