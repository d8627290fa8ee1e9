"""The `instructions evolve` stage: instructions become harder in stages.

    evol   each stage adds something to the instruction of the last one: a constraint, depth, a
           concrete case or a step of reasoning (Evol-Instruct, Xu et al. 2023)
    tree   each stage adds a number of nodes to the instruction's tree of meaning, anew from the
           original (Tree-Instruct, Zhao et al. 2024: 3, 6 and 10 nodes)

Qwen2 report, section 4.1 ("Instruction Evolution"). The prompts are ours. An evolution that failed
is dropped with its reason; as in Evol-Instruct, the next stage goes on from the last good one.
"""

import re
import unicodedata
from collections import Counter
from typing import Literal

from pydantic import Field

from openqwen.instruct.collaborate.pool import Instruction, PoolMethod, read_pool
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.method import Item, Steps, Work
from openqwen.instruct.synthesize.methods.common import AnswersConfig
from openqwen.instruct.synthesize.paths import equations
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.files import read_json
from openqwen.support.stage import PROMPTS, Stage, StageRun
from openqwen.tasks.instructions.languages import language_of

Operator = Literal["constrain", "deepen", "concretize", "reason"]
_LABEL = re.compile(
    r"^[\s*#]*(?:(?:here is )?(?:the )?(?:new|rewritten|revised|evolved) (?:instruction|prompt)"
    r"|instruction|prompt|request|新指令|指令|请求)[\s*]*[:：][\s*]*",
    re.I,
)
_QUOTES = {'"': '"', "“": "”", "「": "」", "'": "'"}
_OPENING = re.compile(
    r"\s*(?:sure|certainly|of course|absolutely|here (?:is|are)|here's|i'm sorry|i am sorry|sorry|"
    r"i can(?:'|no)t|as an ai|the answer is|当然|好的|抱歉|对不起|作为|以下是|答案)",
    re.I,
)
_PROMPT_WORDS = re.compile(
    r"(?:new|rewritten|given|original|revised|evolved) (?:instruction|prompt)|新的?指令|原指令",
    re.I,
)
_ADDED = 2  # fewest words that an evolution adds
_KEPT = 0.25  # smallest share of an instruction's longer words that its evolution keeps
_LANGUAGE_LETTERS = 60  # fewer letters than this do not tell one language of a script from another
_VERDICTS = {"request": "request", "answer": "answer", "请求": "request", "回答": "answer"}


class EvolveConfig(AnswersConfig):
    """How instructions are evolved."""

    form: Literal["evol", "tree"] = Field("evol", description="how an instruction is made harder")
    levels: int = Field(3, ge=1, description="stages of evol")
    operators: list[Operator] = Field(
        ["constrain", "deepen", "concretize", "reason"],
        min_length=1,
        description="what a stage of evol adds, drawn",
    )
    nodes: list[int] = Field(
        [3, 6, 10], min_length=1, description="nodes that the stages of tree add"
    )
    max_tokens: int = Field(512, ge=1, description="longest evolved instruction, in tokens")
    judge_tokens: int = Field(16, ge=1, description="longest judgement, in tokens")
    judged: bool = Field(
        True, description="ask the judge whether an evolution is a request, not an answer"
    )
    originals: bool = Field(True, description="keep the original instructions in the pool, level 0")


class Evolution(PoolMethod):
    """One item an instruction."""

    name = "evolve"
    files = ("instructions",)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Make harder instructions of one."""
        original: Instruction = item.data
        config = self.config
        if config.originals:
            record = original.as_record(level=0, tags=list(original.tags))
            work.record("instructions", record, **original.ancestry())
        tree = config.form == "tree"
        last = original.text
        for level in range(1, 1 + (len(config.nodes) if tree else config.levels)):
            start = original.text if tree else last
            operator = "tree" if tree else str(work.rng.choice(config.operators))
            count = config.nodes[level - 1] if tree else 0
            evolved = yield from self._evolve(start, operator, count, level, work)
            if not evolved:
                continue
            last = evolved
            record = {"id": f"{item.id}~{level}", "prompt": [{"role": "user", "content": evolved}]}
            work.record("instructions", {**record, "level": level, "operator": operator})

    def _evolve(
        self, text: str, operator: str, count: int, level: int, work: Work
    ) -> Steps[str | None]:
        """The evolved instruction, or None where the evolution failed."""
        prompt = work.messages(operator, text=text, nodes=count)
        (output,) = yield from work.ask([prompt], self.config.free)
        evolved = bare(output.text)
        fault = reading.fault(output) or failure(text, evolved)
        if not fault and self.config.judged:
            asked = work.messages("judge", text=evolved)
            (said,) = yield from work.ask([asked], self.config.strict, by="judge")
            verdict = reading.label(said.text, _VERDICTS)
            fault = "answered, says the judge" if verdict == "answer" else ""
        name = f"level {level}, {operator}"
        if not work.gate("evolved", not fault):
            work.refuse(f"{fault}: {name}", f"{text}\n→\n{output.text}")
        work.gate(name, not fault)
        return None if fault else evolved


def bare(text: str) -> str:
    """An instruction without what models write around it: a label, quotation marks."""
    text = _LABEL.sub("", text.strip()).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def failure(text: str, evolved: str) -> str:
    """Why an evolution failed, or "" where it did not."""
    old, new = reading.words(text), reading.words(evolved)
    if not new:
        return "no words"
    added = (Counter(new) - Counter(old)).total()
    if added < _ADDED and len(new) >= len(old):
        return "copied"
    if _OPENING.match(evolved) and not _OPENING.match(text):
        return "answered"
    if len(equations(evolved)) > len(equations(text)) or evolved.count("```") > text.count("```"):
        return "answered"
    if len(new) < len(old):
        return "shortened"
    if _PROMPT_WORDS.search(evolved) and not _PROMPT_WORDS.search(text):
        return "talks of the prompt"
    if _other_language(text, evolved):
        return "changed language"
    subject = {word for word in old if len(word) > 3 or not word.isascii()}
    return "another subject" if len(subject & set(new)) < _KEPT * len(subject) else ""


def _other_language(text: str, evolved: str) -> bool:
    """Whether the script differs, or, where both texts are long enough to tell, the language."""
    scripts, letters = [], []
    for one in (text, evolved):
        names = Counter(unicodedata.name(c, "?").split()[0] for c in one[:5_000] if c.isalpha())
        letters.append(names.total())
        scripts.append(names.most_common(1)[0][0] if names else "")
    if scripts[0] != scripts[1]:
        return all(letters)
    return min(letters) >= _LANGUAGE_LETTERS and language_of(text) != language_of(evolved)


def run_evolve(run: StageRun) -> dict[str, float]:
    """A pool → the same with harder instructions."""
    pool = read_pool(run.data("instructions"))
    counts = synthesize(Evolution(run.config, pool), run, len(pool))
    gate = read_json(run.output / "synthesis.json")["gates"].get("evolved", {"yield": 0.0})
    return {"failed": 1 - gate["yield"], **counts}


STAGE = Stage(
    name="instructions-evolve",
    help="A model makes instructions harder in stages; failed evolutions are dropped.",
    config=EvolveConfig,
    inputs={"instructions": PROMPTS},
    outputs=["instructions"],
    run=run_evolve,
)
