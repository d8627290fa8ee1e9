"""Online DPO with the reward model in the loop (Qwen2 report, 4.3, the online stage).

In each step the current policy answers a few prompts several times. The reward model picks the most
and the least preferred answer to each prompt, and the DPO loss learns from that pair.
"""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openqwen.engine import Output, Sampling
from openqwen.engine.score import score_sequences
from openqwen.model import load_model, load_scorer
from openqwen.support.batching import cut_to_budget
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
from openqwen.train.conversations import encode_prompt
from openqwen.train.dpo import DpoLossConfig, Pairs
from openqwen.train.losses import Loss, document_log_probs
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packing import MicroBatchConfig
from openqwen.train.parallel import join
from openqwen.train.preferences import COMPARED, PreferenceGroup
from openqwen.train.rollouts import RolloutGroup, Rollouts, policy_engine
from openqwen.train.trainer import Place, Trainer, TrainingConfig


class OnlineDpoConfig(DpoLossConfig, MicroBatchConfig, TrainingConfig):
    """Best against worst of several samples by the reward model.

    The reports describe the scheme and give no numbers.
    """

    steps: int = Field(100, gt=0, description="optimizer steps, each with fresh samples")
    batch: int = Field(32, gt=0, description="prompts of one step")
    samples: int = Field(8, gt=1, description="answers sampled for each prompt")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    max_tokens: int = Field(512, gt=0, description="longest answer, in tokens")
    vote: bool = Field(
        False,
        description="weighted majority: an answer weighs the sum of σ(reward) over equal answers",
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer"
    )


@dataclass
class SampledPairs(Pairs):
    """Pairs of this step's answers.

    rewards, lengths: of the step's answers, the mean times the number of these pairs.
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
    world = join().with_mesh(config.train.parallel, model)
    reference = copy.deepcopy(model).requires_grad_(False)
    scorer = load_scorer(reward_model, device=device)
    engine, refresh = policy_engine(model, tokenizer)
    pool = [encode_prompt(tokenizer, record, where) for where, record in read_records(prompts)]
    if not pool:
        raise OpenQwenError("There are no prompts to answer.", where=prompts)
    order = Epochs(len(pool), config.steps * config.batch / len(pool), config.batch, generators)

    def grade(indices: Sequence[int], outputs: Sequence[Output]) -> list[float]:
        sequences = [output.prompt_ids + output.written_ids for output in outputs]
        return score_sequences(scorer, sequences, config.micro_tokens)

    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
    rollouts = Rollouts(engine, refresh, pool, sampling, config.samples, grade, place.seed)

    def batch(step: int) -> list[SampledPairs]:
        return best_and_worst_pairs(rollouts.step(step, order.batch(step)), config, device)

    def loss(pairs: SampledPairs) -> Loss:
        with torch.no_grad():
            pairs.reference = document_log_probs(reference, pairs.rows)
        value = pairs.loss(model, config.beta, world=world)
        value.extras |= {"reward": pairs.rewards, "length": pairs.lengths}
        return value

    trainer = Trainer(place, config, model, batch, loss, config.steps, generators, world=world)
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    return metrics


def best_and_worst_pairs(
    rollouts: Sequence[RolloutGroup], config: OnlineDpoConfig, device: torch.device
) -> list[SampledPairs]:
    """Micro-batches of one pair for each prompt, without prompts whose answers do not differ."""
    groups = []
    for rollout in rollouts:
        if pair := best_and_worst(rollout, config.vote):
            best, worst = pair
            group = PreferenceGroup(best.prompt_ids)
            group.add(best.written_ids, worst.written_ids)
            groups.append(group.to_first_difference() if config.first_difference else group)
    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    lengths = [len(output.token_ids) for rollout in rollouts for output in rollout.outputs]
    micro_batches = []
    for cut in cut_to_budget([group.size for group in groups], config.micro_tokens):
        pairs = SampledPairs.of(groups[cut], torch.empty(0), device)
        share = len(groups[cut]) / len(rewards)
        pairs.rewards, pairs.lengths = sum(rewards) * share, sum(lengths) * share
        micro_batches.append(pairs)
    return micro_batches


def best_and_worst(rollout: RolloutGroup, vote: bool) -> tuple[Output, Output] | None:
    """A prompt's most and least preferred answer; None where the two are equal.

    An answer that was cut off is never the best one, whatever its reward: nothing else teaches the
    policy to stop.
    """
    outputs, values = rollout.outputs, rollout.rewards
    if vote:
        values = votes([output.written_ids for output in outputs], values)
    stopped = [output.finish_reason == "stop" for output in outputs]
    if not any(stopped):
        return None
    numbers = range(len(outputs))
    best = max((n for n in numbers if stopped[n]), key=lambda n: values[n])
    worst = min(numbers, key=lambda n: (stopped[n], values[n]))
    if outputs[best].token_ids == outputs[worst].token_ids:
        return None
    return outputs[best], outputs[worst]


def votes(answers: Sequence[Sequence[int]], rewards: Sequence[float]) -> list[float]:
    """The weight of each answer: σ(reward), summed over all answers that equal it.

    This is Qwen2.5-Math's weighted majority.
    """
    total: dict[tuple[int, ...], float] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        total[tuple(answer)] = total.get(tuple(answer), 0.0) + 1 / (1 + math.exp(-reward))
    return [total[tuple(answer)] for answer in answers]


def run_online_dpo(run: StageRun) -> dict[str, float]:
    """A chat model, its own answers to prompts and a reward model → an aligned one."""
    start, reward_model = run.inputs["model"], run.inputs["reward"]
    tokenizer, prompts = load_tokenizer(start), run.data("prompts")
    return online_dpo(run.config, start, prompts, tokenizer, Place.of(run), reward_model)


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
