"""The `synthesize reasoning` method: problems of logic, solved, voted on and refined.

Qwen2.5 report, section 4.1: multiple-choice, true-or-false and open questions of deductive,
inductive, analogical, causal and statistical reasoning; refinement removes wrong answers and flawed
steps. A model writes the problems, so no answer is given: that of the majority counts as right.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Output
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import phrases
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig
from openqwen.instruct.synthesize.methods.rejection import final_answer
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.generators import Generators
from openqwen.support.stage import Stage, StageRun
from openqwen.tasks.choice import chosen_letter

_KINDS = ("deductive", "inductive", "analogical", "causal", "statistical")
_FORMS = ("choice", "boolean", "open")
_TRUTH = {"true": "true", "false": "false", "真": "true", "假": "false"}
_VERDICT = {"sound": "sound", "flawed": "flawed", "正确": "sound", "有误": "flawed"}


class VotedConfig(AnswersConfig):
    """How problems are solved, voted on and refined."""

    samples: int = Field(8, ge=2, description="solutions sampled for each problem")
    agreement: float = Field(
        0.5, ge=0, lt=1, description="use a problem if more of the solutions have the same answer"
    )
    rounds: int = Field(2, ge=0, description="most critiques of a solution, with revisions between")
    keep: int = Field(2, ge=1, description="most demonstrations of one problem")
    pairs: int = Field(2, ge=0, description="most preference pairs of one problem")


class ReasoningConfig(VotedConfig):
    """Which problems are written."""

    problems: int = Field(1_000, ge=1, description="problems that the model is asked for")
    subjects: Path | None = Field(
        None, description="subjects of the problems, one a line, in place of the shipped ones"
    )


@dataclass(frozen=True)
class VotedProblem:
    """A problem as it is asked. read: the answer of a solution, in a form that can be compared."""

    asked: list[Message]
    read: Callable[[str], str | None]
    origin: dict[str, Any]


class Voted(Method):
    """Problems that the model writes; the majority's answer counts as right."""

    @abstractmethod
    def problem(self, item: Item, work: Work) -> Steps[VotedProblem | None]:
        """Let the model write the problem of an item; None where what it wrote is of no use."""

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Write a problem, solve it, vote, refine, and make records."""
        problem = yield from self.problem(item, work)
        if problem is None:
            return
        config = self.config
        outputs = yield from work.ask([problem.asked] * config.samples, config.free)
        answers: dict[str, str | None] = {}
        votes: Counter[str | None] = Counter()
        for output in outputs:
            usable = work.gate("solution is usable", not reading.fault(output))
            answer = problem.read(output.text) if usable else None
            votes[answer] += 1
            if usable:
                work.gate("solution has an answer", answer is not None)
                answers[output.text.strip()] = answer
        votes.pop(None, None)
        ((winner, count),) = votes.most_common(1) or [(None, 0)]
        reason = f"{count} of {config.samples} agree"
        if not work.gate("majority", count > config.agreement * config.samples, reason):
            return
        right = [text for text, answer in answers.items() if answer == winner][: config.keep]
        wrong = [text for text, answer in answers.items() if answer != winner]
        sound = []
        for text in right:
            refined = yield from self._refined(problem, text, str(winner), work)
            if work.gate("refined solution is sound", refined is not None) and refined:
                sound.append(refined)
        for text in dict.fromkeys(sound):
            work.demonstration(
                [*problem.asked, assistant(text)],
                **problem.origin,
                answer=winner,
                votes=count,
                refined=text not in right,
            )
        for number, rejected in enumerate(wrong[: config.pairs] if sound else []):
            chosen = sound[number % len(sound)]
            work.preference(problem.asked, chosen, rejected, **problem.origin, votes=count)

    def _refined(
        self, problem: VotedProblem, text: str, winner: str, work: Work
    ) -> Steps[str | None]:
        """The solution, revised until a critique finds no flaw; None where none is sound."""
        asked = problem.asked[-1]["content"]
        for turn in range(self.config.rounds):
            prompt = work.messages("critique", problem=asked, response=text)
            (critique,) = yield from work.ask([prompt], self.config.strict, by="judge")
            verdict = reading.label(critique.text, _VERDICT, r"(?:verdict|结论)")
            if verdict == "sound":
                return text
            if verdict is None or turn + 1 == self.config.rounds:
                return None
            values = {"problem": asked, "response": text, "critique": critique.text.strip()}
            (output,) = yield from work.ask([work.messages("revise", **values)], self.config.free)
            if reading.fault(output, (text,)) or problem.read(output.text) != winner:
                return None
            text = output.text.strip()
        return text


class Reasoning(Voted):
    """One item a problem: a kind of reasoning, a form and a subject."""

    name = "reasoning"

    def __init__(self, config: ReasoningConfig, seed: int):
        super().__init__(config)
        self.subjects = phrases("subjects", config.language, config.subjects)
        self.seed = seed

    def items(self) -> Iterable[Item]:
        """Every combination equally often, in a drawn order."""
        every = list(product(_KINDS, _FORMS, self.subjects))
        order = Generators(self.seed)["reasoning"].permutation(len(every))
        for number in range(self.config.problems):
            yield Item(f"problem/{number}", every[order[number % len(every)]])

    def problem(self, item: Item, work: Work) -> Steps[VotedProblem | None]:
        """Write a problem of the item's kind."""
        kind, form, subject = item.data
        prompt = work.messages("ask", reasoning=kind, form=form, subject=subject)
        (output,) = yield from work.ask([prompt], self.config.free)
        fault = reading.fault(output, (prompt[-1]["content"],)) or _misses(output, form)
        if not work.gate("problem is usable", not fault, fault, output.text):
            return None
        asked = work.messages("solve", problem=output.text.strip(), form=form)
        readers = {"choice": _letter, "boolean": _truth, "open": final_answer}
        origin = {"reasoning": kind, "form": form, "subject": subject}
        return VotedProblem(asked, readers[form], origin)


def _misses(output: Output, form: str) -> str:
    options = all(f"{letter}." in output.text for letter in "ABCD")
    return "no four options" if form == "choice" and not options else ""


def _letter(text: str) -> str | None:
    return chosen_letter(text)


def _truth(text: str) -> str | None:
    return reading.label(text, _TRUTH, r"(?:answer|答案)")


def run_reasoning(run: StageRun) -> dict[str, float]:
    """Nothing → problems of logic with solutions, as demonstrations D and preferences P."""
    return synthesize(Reasoning(run.config, run.seed), run, run.config.problems)


STAGE = Stage(
    name="synthesize-reasoning",
    help="Problems of logic, solved by vote and refined, become D and P.",
    config=ReasoningConfig,
    inputs={},
    outputs=["demonstrations", "preferences"],
    run=run_reasoning,
)
