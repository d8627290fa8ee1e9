"""The `synthesize pretraining` method: text for pre-training that a model writes from seeds.

Qwen2 and Qwen2.5 synthesise text with their instruct models and filter it by reward models (Qwen2
report, 3.1; Qwen2.5 report, 3.1); their prompts are unpublished. The kinds are those of public
work:

    rephrase     the content of a passage in another style (WRAP, Maini et al. 2024)
    textbook     a section on the subject of a passage (Gunasekar et al. 2023; Cosmopedia)
    questions    questions that a passage answers, with answers (Cheng et al. 2024)
    mathematics  a problem; of several solutions most have the answer of the one that is kept
    code         a problem with a function that passes its tests in the sandbox

documents.jsonl is read by the `corpus` stage, whose filters then decide as about any other text.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openqwen.engine import Output
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import documents
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig
from openqwen.instruct.synthesize.methods.execution import assertions, defines
from openqwen.instruct.synthesize.methods.rejection import final_answer, weighted_majority
from openqwen.instruct.synthesize.passages import is_chinese, passages
from openqwen.instruct.synthesize.paths import equations, holds
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.sandbox import Limits, Program
from openqwen.support.generators import Generators
from openqwen.support.stage import Stage, StageRun
from openqwen.train.reward_sources import RewardSourcesConfig

TextKind = Literal["rephrase", "textbook", "questions", "mathematics", "code"]
_STYLES = ("plain", "encyclopedia", "conversation")
_AUDIENCES = {
    "en": ("children of ten years", "pupils of a secondary school", "students of a university"),
    "zh": ("十岁的儿童", "中学生", "大学生"),
}
# Words to the one who asked, in place of the text alone.
_TALK = re.compile(
    r"\A\W*(?:sure|certainly|of course|here (?:is|are)|here's|i'm sorry|sorry|as an ai|当然|好的|"
    r"抱歉|对不起|以下是)|\bas an ai\b|\b(?:given|above|provided) (?:text|passage|extract)\b|"
    r"\b(?:the|this) (?:text|passage|extract) (?:says|states|describes|mentions|explains)\b|"
    r"\baccording to (?:the|this) (?:text|passage|extract)\b|"
    r"(?:上述|上面的|给定的)(?:文本|段落|摘录)",
    re.I,
)
_PAIR = re.compile(
    r"^[\s*#\d.]*(?:question|问题)[\s*\d]*[:：].*?^[\s*#\d.]*(?:answer|答案)[\s*\d]*[:：]",
    re.I | re.M | re.S,
)
_FEWEST_TESTS = 2


class PretrainingTextConfig(AnswersConfig):
    """What is written, and what is kept."""

    kinds: list[TextKind] = Field(
        ["rephrase", "textbook", "questions", "mathematics", "code"],
        min_length=1,
        description="kinds of text; a passage gets one of them, drawn",
    )
    shortest: int = Field(400, ge=1, description="fewest characters of a passage")
    longest: int = Field(3_000, ge=1, description="most characters of a passage")
    per_document: int = Field(4, ge=1, description="most passages of one document, drawn")
    least: int = Field(60, ge=1, description="fewest characters of what is written")
    questions: int = Field(5, ge=1, description="questions about a passage")
    solutions: int = Field(4, ge=1, description="solutions of a problem of mathematics")
    majority: float = Field(
        0.5, ge=0, lt=1, description="least share of the solutions with the leading answer"
    )
    reward: Path | None = Field(None, description="a reward model")
    rewards: RewardSourcesConfig = Field(
        default_factory=lambda: RewardSourcesConfig(sources=[]),
        description="other rewards of the texts; none named: the reward model's, if one is given",
    )
    least_reward: float = Field(0.0, description="texts with a lower reward are refused")


class PretrainingText(Method):
    """One item a passage."""

    name = "pretraining"
    files = ("documents",)

    def __init__(self, config: PretrainingTextConfig, source: Path, seed: int):
        super().__init__(config)
        self.source, self.seed = source, seed
        self.rewarded = bool(config.reward or config.rewards.sources)

    def prepare(self, work: Work) -> Steps[None]:
        """Score one text, so that a reward that cannot be asked ends the run before it begins."""
        if self.rewarded:
            said = {"role": "user", "content": "What is one and one?"}
            yield from work.reward([[said, assistant("One and one is two.")]])

    def items(self) -> Iterable[Item]:
        """Passages of the documents, drawn."""
        for document in documents(self.source):
            found = passages(document["text"], self.config.shortest, self.config.longest)
            if not found:
                limits = f"{self.config.shortest} to {self.config.longest} characters"
                yield Item(document["id"], None, f"no passage of whole sentences of {limits}")
            order = Generators(self.seed)[f"passages/{document['id']}"].permutation(len(found))
            for number in sorted(order[: self.config.per_document].tolist()):
                yield Item(f"{document['id']}/{number}", found[number])

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Write a text of the drawn kind, check it, and score it."""
        passage, rng = item.data, work.rng
        language = "zh" if is_chinese(passage) else self.config.language
        kind = str(rng.choice(self.config.kinds))
        style = str(rng.choice(_STYLES))
        audience = str(rng.choice(_AUDIENCES[language]))
        asked = work.messages(
            kind,
            language,
            text=passage,
            style=style,
            audience=audience,
            count=self.config.questions,
        )
        (output,) = yield from work.ask([asked], self.config.free)
        text = output.text.strip()
        fault = reading.fault(output, (passage,)) or self._fault(text)
        if not work.gate(f"{kind}: usable", not fault, fault, text):
            return
        if kind == "mathematics":
            text = yield from self._solved(text, language, work)
        elif kind == "code":
            text = yield from self._tested(text, work)
        elif kind == "questions":
            text = self._pairs(text, work)
        if not text:
            return
        drawn = {"rephrase": {"style": style}, "textbook": {"audience": audience}}
        details: dict[str, Any] = {**drawn.get(kind, {})}
        if self.rewarded:
            (reward,) = yield from work.reward([[*asked, assistant(text)]])
            good = reward >= self.config.least_reward  # of NaN, which is no reward, false
            if not work.gate("reward", good, f"{reward:.2f}", text):
                return
            details["reward"] = reward
        record = {"id": f"{item.id}/{kind}", "text": text, "language": language}
        work.record("documents", record, kind=kind, **details)

    def _fault(self, text: str) -> str:
        if len(text) < self.config.least:
            return "too short"
        return "speaks to the one who asked" if _TALK.search(text) else ""

    def _pairs(self, text: str, work: Work) -> str:
        """Questions and answers, or "" where there are none."""
        found = len(_PAIR.findall(text))
        return text if work.gate("questions: pairs", found > 0, "no pair", text) else ""

    def _solved(self, problem: str, language: str, work: Work) -> Steps[str]:
        """A problem with the first solution that has the answer of most; or ""."""
        asked: list[Message] = work.messages("solve", language, question=problem)
        outputs: list[Output] = yield from work.ask(
            [asked] * self.config.solutions, self.config.free
        )
        texts = [o.text.strip() for o in outputs if not reading.fault(o)]
        answers = [final_answer(text) for text in texts]
        winner, _ = weighted_majority(answers, None)
        share = answers.count(winner) / self.config.solutions if winner is not None else 0.0
        reason = f"the leading answer has {share:.0%} of the solutions"
        if not work.gate("mathematics: agreed", share > self.config.majority, reason, problem):
            return ""
        right = [text for text, answer in zip(texts, answers, strict=True) if answer == winner]
        exact = [text for text in right if all(map(holds, equations(text)))]
        if not work.gate("mathematics: calculations", bool(exact), "all are wrong", right[0]):
            return ""
        return f"{problem}\n\n{exact[0]}"

    def _tested(self, text: str, work: Work) -> Steps[str]:
        """A problem whose function passes its tests; or ""."""
        blocks = reading.blocks(text)
        entry = _function(blocks[0]) if blocks else ""
        tests = [test for block in blocks[1:] for test in assertions(block, entry)] if entry else []
        whole = bool(entry) and defines(blocks[0], entry) and len(tests) >= _FEWEST_TESTS
        if not work.gate("code: function and tests", whole, "they are missing", text):
            return ""
        limits = Limits(seconds=5, memory_mb=512)
        program = Program(blocks[0], tests="\n".join(tests), entry=entry, limits=limits)
        (verdict,) = yield from work.run([program])
        passed = verdict.status == "passed"
        return text if work.gate("code: passes its tests", passed, verdict.status, text) else ""


def _function(source: str) -> str:
    """The name of the last function of a program, which the ones before may help; or ""."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return names[-1] if names else ""


def run_pretraining_text(run: StageRun) -> dict[str, float]:
    """Seed documents → documents for the corpus stage."""
    return synthesize(PretrainingText(run.config, run.inputs["documents"], run.seed), run)


STAGE = Stage(
    name="synthesize-pretraining",
    help="A model writes text for pre-training from seed documents, for the corpus stage.",
    config=PretrainingTextConfig,
    inputs={"documents": "Seeds: a folder or a file of documents: text, HTML, JSONL, Parquet."},
    outputs=["documents"],
    run=run_pretraining_text,
)
