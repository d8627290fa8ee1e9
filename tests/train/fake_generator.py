"""A generator whose answer is a function of the prompt and the seed."""

from openqwen.engine import Generator, Output, Sampling
from openqwen.train.rollouts import Rollouts

PROMPTS = [[10], [20, 21], [30], [40, 41, 42]]


class Fake(Generator):
    """Notes what it was asked."""

    def __init__(self):
        self.asked, self.refreshed = [], []

    def refresh(self, step):
        self.refreshed.append(step)

    def generate(self, prompts, sampling=None, seeds=None, progress=None):
        assert sampling == Sampling(max_tokens=7, temperature=1.0)
        self.asked += [[list(prompt), seed] for prompt, seed in zip(prompts, seeds, strict=True)]
        return [
            Output(token_ids=[*prompt, seed % 1000], prompt_ids=list(prompt), finish_reason="stop")
            for prompt, seed in zip(prompts, seeds)
        ]


def grade(indices, outputs):
    assert [PROMPTS[index] for index in indices] == [output.prompt_ids for output in outputs]
    return [index + sum(o.token_ids) / 7 for index, o in zip(indices, outputs)]


def rollouts(world):
    fake = Fake()
    sampling = Sampling(max_tokens=7, temperature=1.0)
    return Rollouts(fake, fake.refresh, PROMPTS, sampling, 5, grade, seed=3, world=world)
