"""The `synthesize critic` method: keep the answers in which no scorer finds a fault.

Qwen2.5 report, section 4.1 (response filtering): a critic model and several scorers; only answers
that all of them approve of are kept. Of a file of preferences a pair is kept where all approve of
the chosen answer, and one of them does not approve of the rejected one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.instruct.synthesize.inputs import Exchange, exchanges
from openqwen.instruct.synthesize.method import Item, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig, judged, shown
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.records import count_records
from openqwen.support.stage import Stage, StageRun

Scorer = Literal["correctness", "completeness", "language", "safety"]


class CriticConfig(AnswersConfig):
    """Who judges, and what it takes to pass."""

    scorers: list[Scorer] = Field(
        ["correctness", "completeness", "language", "safety"],
        min_length=1,
        description="the scorers, each a prompt; all must pass an answer",
    )
    least: float = Field(9, ge=0, le=10, description="lowest score that passes")
    reward: Path | None = Field(None, description="a reward model, as one more scorer")
    least_reward: float = Field(0.0, description="lowest reward that passes")


class Critic(Method):
    """One item a conversation, or a preference."""

    name = "critic"

    def __init__(self, config: CriticConfig, source: Path):
        super().__init__(config)
        self.source = source

    def items(self) -> Iterable[Item]:
        """The records of the file."""
        return exchanges(self.source)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Judge the answer; of a preference, the rejected one too."""
        exchange: Exchange = item.data
        if not (yield from self._passes(exchange, exchange.answer, "", work)):
            return
        source = {"source": exchange.origin}
        if exchange.rejected is None:
            work.demonstration([*exchange.prompt, assistant(exchange.answer)], **source)
            return
        fine = yield from self._passes(exchange, exchange.rejected, "rejected: ", work)
        if work.gate("rejected answer is worse", not fine, "all scorers pass the rejected answer"):
            work.preference(exchange.prompt, exchange.answer, exchange.rejected, **source)

    def _passes(self, exchange: Exchange, answer: str, label: str, work: Work) -> Steps[bool]:
        """Whether every scorer passes an answer."""
        talk = "\n\n".join(f"{m['role']}: {m['content']}" for m in exchange.prompt)
        values = {"conversation": talk, "response": answer}
        prompts = [work.messages(name, **values) for name in self.config.scorers]
        scores = yield from judged(work, prompts, self.config)
        passed = True
        for name, score in zip(self.config.scorers, scores):
            fine = score is not None and score >= self.config.least
            passed &= work.gate(f"{label}{name}", fine, "" if label else shown(score), answer)
        if self.config.reward:
            (reward,) = yield from work.reward([[*exchange.prompt, assistant(answer)]])
            fine = reward >= self.config.least_reward
            passed &= work.gate(f"{label}reward", fine, "" if label else f"{reward:.2f}", answer)
        return passed


def run_critic(run: StageRun) -> dict[str, float]:
    """Demonstrations or preferences → those that all scorers pass."""
    source = run.inputs["records"]
    return synthesize(Critic(run.config, source), run, count_records(source))


STAGE = Stage(
    name="synthesize-critic",
    help="Keep the demonstrations, or the preferences, that several scorers all pass.",
    config=CriticConfig,
    inputs={"records": "A file of demonstrations D or of preferences P."},
    outputs=["demonstrations", "preferences"],
    run=run_critic,
)
