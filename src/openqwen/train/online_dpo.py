"""Online DPO with the reward model in the loop (Qwen2 report, 4.3, the online stage).

Each step the current policy answers a few prompts several times; the reward model picks the most
and the least preferred answer of each prompt; the DPO loss learns from that pair. The engine holds
the very module that trains; over several processes, where that is sharded, each holds a whole copy
that is refreshed every step.
"""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openqwen.engine import Engine, Output, Sampling
from openqwen.model import load_model, load_scorer
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.records import read_records
from openqwen.support.stage import (
    CHAT,
    CONVERSATION,
    MODEL,
    PROMPTS,
    REWARD,
    Effort,
    Stage,
    StageRun,
)
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.conversations import PreferenceGroup, encode_prompt
from openqwen.train.dpo import Pairs
from openqwen.train.losses import Loss, document_log_probs
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.parallel import copy_weights, join
from openqwen.train.preferences import COMPARED
from openqwen.train.reward import score_sequences
from openqwen.train.rows import cut_to_budget
from openqwen.train.trainer import Place, Trainer, TrainingConfig


class OnlineDpoConfig(TrainingConfig):
    """Best against worst of several samples by the reward model.

    The reports give no numbers but the scheme.
    """

    steps: int = Field(100, gt=0, description="optimizer steps, each with fresh samples")
    batch: int = Field(32, gt=0, description="prompts of one step")
    samples: int = Field(8, gt=1, description="answers sampled for each prompt")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    max_tokens: int = Field(512, gt=0, description="longest answer")
    vote: bool = Field(
        False,
        description=(
            "prefer by weighted majority: an answer's weight is the sum of σ(reward) over equal "
            "ones"
        ),
    )
    first_difference: bool = Field(
        False,
        description=(
            "compare answers only as far as the first token at which they differ (Step-DPO)"
        ),
    )
    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference model")
    micro_tokens: int = Field(
        8_192, gt=0, description="tokens of one forward call; changes memory and speed alone"
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer"
    )


@dataclass
class Episode(Pairs):
    """Pairs made in this step; `rewards` and `lengths` are sums over the pairs of their prompts'
    sample means.
    """

    rewards: float = 0.0
    lengths: float = 0.0


def online_dpo(
    config: OnlineDpoConfig,
    start: Path,
    prompts: Path,
    tokenizer: Tokenizer,
    place: Place,
    reward_model: Path,
) -> dict[str, float]:
    """Improve the model at `start`, which is the reference too, on prompts; save to the output."""
    generators = Generators(place.seed)
    device = best_device()
    model = load_model(start, device=device)
    reference = copy.deepcopy(model).requires_grad_(False)
    scorer = load_scorer(reward_model, device=device)
    world = join()
    actor = (
        model if world.alone else copy.deepcopy(model).requires_grad_(False)
    )  # whole where the other is sharded
    engine = Engine(actor, tokenizer)
    pool = [encode_prompt(tokenizer, record, where) for where, record in read_records(prompts)]
    if not pool:
        raise OpenQwenError("There are no prompts to answer.", where=prompts)
    order = Epochs(len(pool), config.steps * config.batch / len(pool), config.batch, generators)
    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)

    def batch(step: int) -> list[Episode]:
        asked = [pool[i] for i in order.batch(step) for _ in range(config.samples)]
        # Seeds are a function of the step: a resumed run draws what the uninterrupted run would
        # have drawn.
        seeds = Generators(place.seed)[f"sampling.{step}"].integers(0, 2**62, len(asked))
        if actor is not model:
            copy_weights(model, actor)
        engine.refresh(step)
        mine = slice(
            world.rank, None, world.size
        )  # prompts are dealt to the ranks, and their answers told to all
        outputs = engine.generate(asked[mine], sampling, seeds=[int(s) for s in seeds[mine]])
        rewards = score_sequences(scorer, [_ids(o) for o in outputs], config.micro_tokens)
        outputs, rewards = world.told(outputs), world.told(rewards)
        sequences = [_ids(o) for o in outputs]
        slices = [slice(n, n + config.samples) for n in range(0, len(outputs), config.samples)]
        ranks = (
            [v for g in slices for v in votes(sequences[g], rewards[g])] if config.vote else rewards
        )
        found = [
            pair for pair in (_best_and_worst(outputs, ranks, group) for group in slices) if pair
        ]
        groups = []
        for best, worst in found:
            prompt = outputs[best].prompt_ids
            groups.append(PreferenceGroup(prompt))
            groups[-1].add(*(sequences[n][len(prompt) :] for n in (best, worst)))
        if config.first_difference:
            groups = [group.to_first_difference() for group in groups]
        episodes = []
        for cut in cut_to_budget([group.size for group in groups], config.micro_tokens):
            part = groups[cut]
            share = len(part) / len(rewards)
            episode = Episode.of(part, torch.empty(0), device)
            episode.rewards = sum(rewards) * share
            episode.lengths = sum(len(o.token_ids) for o in outputs) * share
            episodes.append(episode)
        return episodes

    def loss(episode: Episode) -> Loss:
        with torch.no_grad():
            episode.reference = document_log_probs(reference, episode.rows)
        value = episode.loss(model, config.beta)
        value.extras |= {"reward": episode.rewards, "length": episode.lengths}
        return value

    trainer = Trainer(place, config, model, batch, loss, config.steps, generators)
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    return metrics


def votes(answers: Sequence[Sequence[int]], rewards: Sequence[float]) -> list[float]:
    """Each answer's share of the vote: σ(reward), summed over the answers equal to it (weighted
    majority).
    """
    total: dict[tuple[int, ...], float] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        total[tuple(answer)] = total.get(tuple(answer), 0.0) + 1 / (1 + math.exp(-reward))
    return [total[tuple(answer)] for answer in answers]


def _ids(output: Output) -> list[int]:
    """The whole sequence as the policy wrote it, its end token included."""
    return output.prompt_ids + output.written_ids


def _best_and_worst(
    outputs: list[Output], rewards: list[float], group: slice
) -> tuple[int, int] | None:
    """Numbers of a prompt's most and least preferred answers; None where the samples do not differ.

    An answer that never ended is not preferred, whatever its score: nothing else teaches a policy
    to stop.
    """
    numbers = range(group.start, group.stop)
    ended = [n for n in numbers if outputs[n].finish_reason == "stop"]
    if not ended:
        return None
    best = max(ended, key=lambda n: rewards[n])
    worst = min(numbers, key=lambda n: (outputs[n].finish_reason == "stop", rewards[n]))
    return None if outputs[best].token_ids == outputs[worst].token_ids else (best, worst)


def run_online_dpo(run: StageRun) -> dict[str, float]:
    """A chat model, its own answers to prompts and a reward model → an aligned one."""
    start = run.inputs["model"]
    return online_dpo(
        run.config,
        start,
        run.data("prompts"),
        load_tokenizer(start),
        Place.of(run),
        run.inputs["reward"],
    )


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    config = recipe.online_dpo
    asked = config.steps * config.batch
    return Effort(
        answers=asked * config.samples,
        rows={CONVERSATION: asked * COMPARED},
        micro_tokens=config.micro_tokens,
        longest=config.micro_tokens,
        data_from="online_dpo",
        beside=2,  # the reference and the reward model
    )


STAGE = Stage(
    name="online-dpo",
    help="DPO on the model's own answers, judged by the reward model.",
    config=OnlineDpoConfig,
    inputs={"model": MODEL, "reward": REWARD, "prompts": PROMPTS},
    outputs=["model", CHAT],
    run=run_online_dpo,
    trains_on_ranks=True,
    estimate=_effort,
)
