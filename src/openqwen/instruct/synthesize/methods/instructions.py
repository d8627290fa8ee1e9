"""The `synthesize instructions` method: AutoIF (Dong et al. 2024).

    seed constraints → new constraints → for each constraint:
      functions and cases → cross-validation → back-translation → with queries → responses
      → execution → match with the query → D and P

The defaults of the thresholds are the paper's. Its released code differs: a case is kept if any
function agrees (case_accuracy 0), a function at 0.8 and more, with at least 3 functions and 10
cases before that; a response if any function passes it (response_accuracy 0).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from openqwen.engine import Output
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import Question, phrases, questions
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig, judged, shown
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.instruct.synthesize.verification import (
    cross_validate,
    outcomes,
    read_cases,
    read_function,
    share,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.stage import Stage, StageRun

_RELATIONS = {
    "entailment": "entailment",
    "neutral": "neutral",
    "contradiction": "contradiction",
    "蕴含": "entailment",
    "中立": "neutral",
    "矛盾": "contradiction",
}


class InstructionsConfig(AnswersConfig):
    """The settings of AutoIF; thresholds are the paper's."""

    constraints: Path | None = Field(
        None, description="seed constraints, one a line, in place of the shipped 36"
    )
    rounds: int = Field(100, ge=0, description="requests for new constraints; 0 keeps the seeds")
    per_round: int = Field(50, ge=1, description="new constraints asked for in each request")
    similarity: float = Field(
        0.7, gt=0, le=1, description="likeness to a known constraint at which a new one is dropped"
    )
    generations: int = Field(
        8, ge=1, description="verification functions, and lists of cases, for each constraint"
    )
    cases: int = Field(3, ge=1, description="test cases asked for in each list")
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
    seconds: float = Field(5.0, gt=0, description="CPU time of one run of a function")


class Instructions(Method):
    """One item a constraint."""

    name = "instructions"

    def __init__(self, config: InstructionsConfig, queries: Path):
        super().__init__(config)
        self.seeds = phrases("constraints", config.language, config.constraints)
        found = questions(queries)
        self.queries = [q for q in found if config.shortest <= len(q.text) <= config.longest]
        if not self.queries:
            what = f"No query has {config.shortest} to {config.longest} characters."
            raise OpenQwenError(what, queries, "give other queries, or --shortest and --longest")
        self.constraints = list(self.seeds)

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
        for output in (yield from work.ask(prompts, self.config.free)):
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
        yield from self._respond(item.data, functions, work)

    def _verifiers(self, constraint: str, work: Work) -> Steps[list[str]]:
        """The functions that survive cross-validation; none where too little is left."""
        config = self.config
        wanted = work.messages("function", constraint=constraint)
        listed = work.messages("cases", constraint=constraint, count=config.cases)
        count = config.generations
        outputs = yield from work.ask([wanted] * count + [listed] * count, config.free)
        functions, cases = [], []
        for output in outputs[:count]:
            function = read_function(output.text)
            if work.gate("has a function", function is not None, "no function", output.text):
                functions.append(str(function))
        for output in outputs[count:]:
            found = read_cases(output.text)
            found = [c for c in found if f'"{c.response}"' not in listed[-1]["content"]]
            work.gate("has cases", bool(found), "no cases", output.text)
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

    def _means_the_same(self, constraint: str, functions: Sequence[str], work: Work) -> Steps[bool]:
        """Back-translation: no function's description may contradict the constraint."""
        shown = functions[: self.config.back_translations]
        prompts = [work.messages("describe", function=function) for function in shown]
        described = yield from work.ask(prompts, self.config.strict)
        told = [output.text.strip() for output in described if not reading.fault(output)]
        prompts = [work.messages("entail", first=constraint, second=text) for text in told]
        judged = yield from work.ask(prompts, self.config.strict, by="judge")
        relations = [reading.label(output.text, _RELATIONS) for output in judged]
        same = not shown or (bool(told) and not {"contradiction", None} & set(relations))
        reason = f"{', '.join(map(str, relations)) or 'no description'}: {' | '.join(told)}"
        return work.gate("back-translation agrees", same, reason, constraint)

    def _respond(self, constraint: str, functions: Sequence[str], work: Work) -> Steps[None]:
        """Add the constraint to queries, sample responses, and make records of them."""
        config = self.config
        drawn = [self.queries[n] for n in work.rng.permutation(len(self.queries))]
        drawn = drawn[: config.queries]
        asked = [work.messages("query", query=q.text, constraint=constraint) for q in drawn]
        every = [prompt for prompt in asked for _ in range(config.responses)]
        outputs = yield from work.ask(every, config.free)
        table = yield from outcomes(work, functions, [o.text for o in outputs], config.seconds)
        accuracy = [share([row[n] is True for row in table]) for n in range(len(outputs))]
        groups = []
        for number, (query, prompt) in enumerate(zip(drawn, asked)):
            here = slice(number * config.responses, (number + 1) * config.responses)
            sources = (query.text, prompt[-1]["content"])
            groups.append(self._sorted(outputs[here], accuracy[here], sources, work))
        prompts = [
            work.messages("match", query=query.text, constraint=constraint, response=text)
            for query, (passed, _) in zip(drawn, groups)
            for text in passed
        ]
        scores = iter((yield from judged(work, prompts, config)))
        for query, prompt, (passed, failed) in zip(drawn, asked, groups):
            self._record(query, prompt, constraint, {t: next(scores) for t in passed}, failed, work)

    def _sorted(
        self,
        outputs: Sequence[Output],
        accuracy: Sequence[float],
        sources: tuple[str, ...],
        work: Work,
    ) -> tuple[list[str], list[str]]:
        """The different responses to one query that enough functions pass, and that none passes."""
        passed, failed = [], []
        for output, value in zip(outputs, accuracy):
            text = output.text.strip()
            if not work.gate("response is usable", not reading.fault(output, sources)):
                continue
            if work.gate("response is verified", value > self.config.response_accuracy):
                passed.append(text)
            elif value == 0:
                failed.append(text)
        return list(dict.fromkeys(passed)), list(dict.fromkeys(failed))

    def _record(
        self,
        query: Question,
        prompt: list[Message],
        constraint: str,
        scores: dict[str, float | None],
        failed: list[str],
        work: Work,
    ) -> None:
        """D of the responses that match their query, P of them against those that failed."""
        origin = {"parents": [work.item, query.id], "constraint": constraint}
        good = []
        for text, score in scores.items():
            fits = score is not None and score >= self.config.match
            if work.gate("response matches query", fits, shown(score), text):
                good.append(text)
                work.demonstration([*prompt, assistant(text)], **origin, match=score)
        for chosen, rejected in list(zip(good, failed))[: self.config.pairs]:
            work.preference(prompt, chosen, rejected, **origin)


def run_instructions(run: StageRun) -> dict[str, float]:
    """Queries → demonstrations D and preferences P with constraints that programs checked."""
    return synthesize(Instructions(run.config, run.data("questions")), run)


STAGE = Stage(
    name="synthesize-instructions",
    help="Write constraints and functions that check them; answers that pass become D and P.",
    config=InstructionsConfig,
    inputs={"questions": "Queries to add constraints to: a file of prompts or conversations."},
    outputs=["demonstrations", "preferences"],
    run=run_instructions,
)
