"""The `instructions respond` stage: several responses to each instruction, by several strategies.

Qwen2 report, section 4.1 ("Human Annotation"): responses come from different generation strategies
and from models of different sizes. People rank them (`openqwen annotate`). A strategy is a model, a
temperature and a system prompt; each instruction gets a drawn choice of them.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from openqwen.engine import Sampling
from openqwen.instruct.collaborate.pool import Instruction, PoolMethod, read_pool
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.config import SynthesisConfig, open_generators
from openqwen.instruct.synthesize.method import Item, Steps, Work
from openqwen.instruct.synthesize.runner import Generators, Synthesis
from openqwen.support.stage import PROMPTS, Stage, StageRun


class RespondConfig(SynthesisConfig):
    """The strategies, and how many responses there are."""

    models: list[Path] = Field(
        [], description="more models, such as other sizes; each a folder, a .gguf file or a hub id"
    )
    temperatures: list[float] = Field([0.3, 0.7, 1.0], min_length=1, description="of sampling")
    systems: list[Literal["none", "brief", "thorough", "steps"]] = Field(
        ["none", "brief", "thorough", "steps"],
        min_length=1,
        description="system prompts, by the names of their files",
    )
    responses: int = Field(4, ge=2, description="responses to each instruction")
    least: int = Field(2, ge=1, description="drop instructions with fewer different responses")
    max_tokens: int = Field(1024, ge=1, description="longest response, in tokens")
    similarity: float = Field(
        0.9, gt=0, le=1, description="likeness of words from which on two responses count as one"
    )


class ResponseStrategy(NamedTuple):
    """How a response is made. model: the generator's name in the run. system: a prompt's name."""

    model: str
    temperature: float
    system: str


class Responding(PoolMethod):
    """One item an instruction."""

    name = "respond"
    files = ("tasks",)

    def __init__(self, config: RespondConfig, pool: Sequence[Instruction], models: dict[str, str]):
        super().__init__(config, pool)
        self.models = models
        parts = product(models, config.temperatures, config.systems)
        self.strategies = [ResponseStrategy(*part) for part in parts]
        self.sampling = {t: Sampling(config.max_tokens, t) for t in config.temperatures}

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Ask for the responses to one instruction, and keep those that differ."""
        question = item.data.text
        asked = [{"role": "user", "content": question}]
        known = reading.Novelty(self.config.similarity)
        responses: list[dict[str, Any]] = []
        for strategy in self._drawn(work):
            system = []
            if strategy.system != "none":
                (told,) = work.messages(strategy.system)
                system = [{**told, "role": "system"}]
            sampling = self.sampling[strategy.temperature]
            (output,) = yield from work.ask([[*system, *asked]], sampling, by=strategy.model)
            fault = reading.fault(output, (question,))
            if not work.gate("response is usable", not fault, fault, output.text):
                continue
            text = output.text.strip()
            name = self.models[strategy.model]
            if work.gate("response is new", known.add(text)):
                origin = {"temperature": strategy.temperature, "system": strategy.system}
                number = str(len(responses))
                responses.append({"id": number, "text": text, "origin": {"model": name, **origin}})
        enough = len(responses) >= self.config.least
        reason = f"{len(responses)} different responses"
        if work.gate("instruction has responses", enough, reason, question):
            work.record("tasks", {"id": item.id, "prompt": asked, "responses": responses})

    def _drawn(self, work: Work) -> list[ResponseStrategy]:
        """Strategies in random order, the models in turn; all again where they run out."""
        used: Counter[str] = Counter()
        turns: list[tuple[int, ResponseStrategy]] = []
        for number in work.rng.permutation(len(self.strategies)):
            strategy = self.strategies[number]
            turns.append((used[strategy.model], strategy))
            used[strategy.model] += 1
        order = [strategy for _, strategy in sorted(turns, key=lambda turn: turn[0])]
        return [order[n % len(order)] for n in range(self.config.responses)]


def open_models(config: RespondConfig, inputs: dict[str, Path]) -> Generators:
    """The generators of the run: "model", and one for each of the other models."""
    generators = open_generators(config, inputs)
    for number, path in enumerate(config.models, 2):
        one = SynthesisConfig(model=path, quantize=config.quantize, limits=config.limits)
        generators[f"model-{number}"] = open_generators(one, {})["model"]
    return generators


def run_respond(run: StageRun) -> dict[str, float]:
    """A pool → tasks for annotation: instructions with their responses."""
    pool = read_pool(run.data("instructions"))
    generators = open_models(run.config, dict(run.inputs))
    models = {key: name for key, (_, name, _) in generators.items() if key != "judge"}
    method = Responding(run.config, pool, models)
    runner = Synthesis(method, generators, run.config, run.seed, run.output, run.scratch)
    return runner.run(len(pool))


STAGE = Stage(
    name="instructions-respond",
    help="Several responses to each instruction, for people to rank.",
    config=RespondConfig,
    inputs={"instructions": PROMPTS},
    outputs=["tasks"],
    run=run_respond,
)
