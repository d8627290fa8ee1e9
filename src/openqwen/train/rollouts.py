"""Rollouts: the current policy's answers to prompts, graded, shared over all ranks.

Each step of an online stage asks a few prompts several times:

    prompts of the step    0    7    3
    requests               0 0  7 7  3 3    `samples` of each
    rank                   0 1  0 1  0 1    each rank generates and grades its own
    groups                 [0 0][7 7][3 3]  every rank gets all of them, in the order of the prompts
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openqwen.engine import Engine, Generator, Output, Prompt, Sampling
from openqwen.model import Qwen2
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.train.parallel import World, copy_weights, join

# Rewards of answers. Arguments: the index of each answer's prompt, and the answers.
Grader = Callable[[Sequence[int], Sequence[Output]], list[float]]


@dataclass
class RolloutGroup:
    """The answers to one prompt, `samples` of them, and their rewards. prompt: its index."""

    prompt: int
    outputs: list[Output]
    rewards: list[float]


@dataclass
class Rollouts:
    """Makes the groups of each step.

    Args:
        generator: answers prompts.
        refresh: gives the generator the policy's weights of this step; every rank calls it.
        prompts: all prompts of the stage; steps choose from them by index.
        sampling: how to sample an answer. Its seed is not used.
        samples: answers to each prompt.
        grade: gives the rewards of this rank's answers.
        seed: of all draws.
    """

    generator: Generator
    refresh: Callable[[int], None]
    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int
    grade: Grader
    seed: int
    world: World = field(default_factory=join)

    def step(self, step: int, chosen: Sequence[int]) -> list[RolloutGroup]:
        """The groups of the chosen prompts, in their order, the same on every rank.

        The draws depend on the seed, the step and the place in it alone: a resumed run draws what
        an uninterrupted one draws, on any number of ranks.
        """
        self.refresh(step)
        asked = [index for index in chosen for _ in range(self.samples)]
        seeds = Generators(self.seed)[f"sampling.{step}"].integers(0, 2**62, len(asked))
        mine = slice(self.world.rank, None, self.world.size)
        prompts = [self.prompts[index] for index in asked[mine]]
        outputs = self.generator.generate(prompts, self.sampling, [int(s) for s in seeds[mine]])
        rewards = self.grade(asked[mine], outputs)
        outputs, rewards = self.world.gather(outputs), self.world.gather(rewards)
        assert len(outputs) == len(rewards) == len(asked)
        groups = []
        for number, index in enumerate(chosen):
            answers = slice(number * self.samples, (number + 1) * self.samples)
            groups.append(RolloutGroup(index, outputs[answers], rewards[answers]))
        return groups


def policy_engine(model: Qwen2, tokenizer: Tokenizer) -> tuple[Engine, Callable[[int], None]]:
    """An engine that generates with the weights of a model in training, and its `refresh`.

    Call this before the model is sharded. In one process the engine holds the very module that
    trains. Over several ranks, where that one is sharded, each rank's engine holds a whole copy,
    which `refresh` fills.
    """
    copied = None if join().alone else copy.deepcopy(model).requires_grad_(False)
    engine = Engine(model if copied is None else copied, tokenizer)

    def refresh(step: int) -> None:
        if copied is not None:
            copy_weights(model, copied)
        engine.refresh(step)

    return engine, refresh
