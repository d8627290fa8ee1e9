"""What several methods share: how answers are sampled, and how a judge scores them."""

from collections.abc import Sequence

from pydantic import Field

from openqwen.engine import Sampling
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.method import Message, Steps, Work


class AnswersConfig(SynthesisConfig):
    """How answers and judgements are sampled."""

    temperature: float = Field(0.8, ge=0, description="of everything but judgements")
    max_tokens: int = Field(1024, ge=1, description="longest answer, in tokens")
    judge_tokens: int = Field(512, ge=1, description="longest judgement, in tokens")

    @property
    def free(self) -> Sampling:
        """For answers."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature)

    @property
    def strict(self) -> Sampling:
        """For judgements: the likeliest one."""
        return Sampling(max_tokens=self.judge_tokens)


def judged(
    work: Work, prompts: Sequence[list[Message]], config: AnswersConfig
) -> Steps[list[float | None]]:
    """The judge's score, 0 to 10, in answer to each prompt; None where it gives none."""
    outputs = yield from work.ask(prompts, config.strict, by="judge")
    return [reading.score(output.text) for output in outputs]


def shown(score: float | None) -> str:
    """A score in a reason for the quarantine."""
    return "no score" if score is None else f"score {score:g}"
