"""The `synthesize instructions` method: AutoIF (Dong et al. 2024).

    seed constraints → new constraints → for each constraint:
      functions and cases → cross-validation → back-translation → with queries → responses
      → execution → match with the query → D and P

The defaults of the thresholds are the paper's. Its released code differs: a case is kept if any
function agrees (case_accuracy 0), a function at 0.8 and more, with at least 3 functions and 10
cases before that; a response if any function passes it (response_accuracy 0).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Sampling
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.inputs import phrases, questions
from openqwen.instruct.synthesize.method import Item, Method, Steps, Work
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.instruct.synthesize.verification import (
    cross_validate,
    outcomes,
    read_cases,
    read_function,
    share,
)
from openqwen.support.stage import Stage, StageRun

_RELATIONS = {
    "entailment": "entailment",
    "neutral": "neutral",
    "contradiction": "contradiction",
    "蕴含": "entailment",
    "中立": "neutral",
    "矛盾": "contradiction",
}


class InstructionsConfig(SynthesisConfig):
    """The settings of AutoIF; thresholds are the paper's."""

    constraints: Path | None = Field(
        None, description="seed constraints, one a line, in place of the shipped 36"
    )
    rounds: int = Field(100, ge=0, description="requests for new constraints; 0 keeps the seeds")
    per_round: int = Field(50, ge=1, description="new constraints asked for in each request")
    similarity: float = Field(
        0.7, gt=0, le=1, description="ROUGE-L to a known constraint at which a new one is dropped"
    )
    generations: int = Field(
        8, ge=1, description="answers with a verification function for each constraint"
    )
    cases: int = Field(3, ge=1, description="test cases asked for in each of these answers")
    case_accuracy: float = Field(
        0.5, ge=0, lt=1, description="keep a case that more of the functions agree with"
    )
    function_accuracy: float = Field(
        0.5, ge=0, lt=1, description="keep a function that is right on more of the kept cases"
    )
    least_functions: int = Field(1, ge=1, description="fewest kept functions of a constraint")
    least_cases: int = Field(1, ge=1, description="fewest kept cases of a constraint")
    contrast: bool = Field(
        False, description="demand kept cases of both outcomes: a function must say no to something"
    )
    back_translations: int = Field(
        3, ge=0, description="functions whose description is compared with the constraint"
    )
    queries: int = Field(16, ge=1, description="queries that each constraint is added to")
    shortest: int = Field(20, ge=1, description="fewest characters of a query")
    longest: int = Field(300, ge=1, description="most characters of a query")
    responses: int = Field(8, ge=1, description="answers to each query with its constraint")
    response_accuracy: float = Field(
        0.5, ge=0, lt=1, description="keep a response that more of the functions pass"
    )
    match: float = Field(
        8, ge=0, le=10, description="lowest score (0 to 10) of how a response fits its query"
    )
    pairs: int = Field(1, ge=0, description="most pairs made of the responses to one query")
    temperature: float = Field(0.8, ge=0, description="of everything but judgements")
    max_tokens: int = Field(1024, ge=1, description="longest answer, in tokens")
    seconds: float = Field(5.0, gt=0, description="CPU time of one run of a function")


@dataclass(frozen=True)
class Verified:
    """A constraint with the functions that check it."""

    text: str
    functions: list[str]


class Instructions(Method):
    """One item a constraint."""

    name = "instructions"

    def __init__(self, config: InstructionsConfig, queries: Path):
        super().__init__(config)
        self.seeds = phrases("constraints", config.language, config.constraints)
        found = questions(queries)
        self.queries = [q for q in found if config.shortest <= len(q.text) <= config.longest]
        self.constraints = list(self.seeds)
        self.free = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        self.strict = Sampling(max_tokens=config.max_tokens)

    def prepare(self, work: Work) -> Steps[None]:
        """Self-instruct: ask for constraints like some of the seeds, and keep those that are new.

        The paper shows all its seeds each time; drawing a part of them varies the requests.
        """
        prompts = []
        for _ in range(self.config.rounds):
            order = work.rng.permutation(len(self.seeds))[: max(1, len(self.seeds) // 2)]
            shown = [self.seeds[n] for n in order]
            prompts.append(work.messages("expand", seeds=shown, count=self.config.per_round))
        known = reading.Novelty(self.config.similarity, self.seeds)
        for output in (yield from work.ask(prompts, self.free)):
            found = reading.items(output.text)
            work.gate("has new constraints", bool(found), "no list", output.text)
            for text in found:
                if work.gate("is a new constraint", len(text) <= 300 and known.add(text)):
                    self.constraints.append(text)

    def items(self) -> Iterable[Item]:
        """The constraints."""
        for number, constraint in enumerate(self.constraints):
            yield Item(f"constraint-{number}", constraint)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Verify one constraint, then make records of it with drawn queries."""
        functions = yield from self._verifiers(item.data, work)
        if not functions or not (yield from self._means_the_same(item.data, functions, work)):
            return
        yield from self._respond(Verified(item.data, functions), work)

    def _verifiers(self, constraint: str, work: Work) -> Steps[list[str]]:
        """The functions that survive cross-validation; none where too little is left."""
        config = self.config
        prompt = work.messages("verify", constraint=constraint, cases=config.cases)
        functions, cases = [], []
        for output in (yield from work.ask([prompt] * config.generations, self.free)):
            function = read_function(output.text)
            if work.gate("has a function", function is not None, "no function", output.text):
                functions.append(str(function))
            found = read_cases(output.text)
            work.gate("has cases", bool(found))
            cases += found
        functions, cases = list(dict.fromkeys(functions)), list(dict.fromkeys(cases))
        table = yield from outcomes(work, functions, [c.response for c in cases], config.seconds)
        good, agreed = cross_validate(
            table, [c.expected for c in cases], config.case_accuracy, config.function_accuracy
        )
        for number in range(len(cases)):
            work.gate("case agrees with functions", number in agreed)
        for number in range(len(functions)):
            work.gate("function agrees with cases", number in good)
        both = len({cases[n].expected for n in agreed}) == 2 or not config.contrast
        enough = len(good) >= config.least_functions and len(agreed) >= config.least_cases
        what = f"{len(good)} functions and {len(agreed)} cases are left"
        verified = work.gate("constraint is verified", enough and both, what, constraint)
        return [functions[n] for n in good] if verified else []

    def _means_the_same(
        self, constraint: str, functions: Sequence[str], work: Work
    ) -> Steps[bool]:
        """Back-translation: no function's description may contradict the constraint."""
        shown = functions[: self.config.back_translations]
        prompts = [work.messages("describe", function=function) for function in shown]
        described = yield from work.ask(prompts, self.strict)
        told = [output.text.strip() for output in described if not reading.fault(output)]
        prompts = [work.messages("entail", first=constraint, second=text) for text in told]
        judged = yield from work.ask(prompts, self.strict, by="judge")
        relations = [reading.label(output.text, _RELATIONS) for output in judged]
        same = not shown or (bool(told) and not {"contradiction", None} & set(relations))
        reason = f"{', '.join(map(str, relations)) or 'no description'}: {' | '.join(told)}"
        return work.gate("back-translation agrees", same, reason, constraint)

    def _respond(self, verified: Verified, work: Work) -> Steps[None]:
        """Add the constraint to queries, sample responses, and make records of them."""
        config = self.config
        count = min(config.queries, len(self.queries))
        drawn = [self.queries[n] for n in work.rng.permutation(len(self.queries))[:count]]
        asked = [work.messages("query", query=q.text, constraint=verified.text) for q in drawn]
        every = [prompt for prompt in asked for _ in range(config.responses)]
        outputs = yield from work.ask(every, self.free)
        accuracy = yield from self._accuracies(verified, [o.text for o in outputs], work)
        for number, (query, prompt) in enumerate(zip(drawn, asked)):
            here = range(number * config.responses, (number + 1) * config.responses)
            passed: dict[str, float] = {}
            failed: dict[str, float] = {}
            for n in here:
                text = outputs[n].text.strip()
                fault = reading.fault(outputs[n], (query.text, prompt[-1]["content"]))
                if not work.gate("response is usable", not fault):
                    continue
                if work.gate("response is verified", accuracy[n] > config.response_accuracy):
                    passed[text] = accuracy[n]
                elif accuracy[n] == 0:
                    failed[text] = 0.0
            good = yield from self._matching(query.text, verified.text, list(passed), work)
            origin: dict[str, Any] = {"parents": [work.item, query.id], "constraint": verified.text}
            for text, score in good:
                work.demonstration(
                    [*prompt, {"role": "assistant", "content": text}],
                    **origin,
                    accuracy=passed[text],
                    match=score,
                )
            for (chosen, score), rejected in list(zip(good, failed))[: config.pairs]:
                work.preference(prompt, chosen, rejected, **origin, match=score)
