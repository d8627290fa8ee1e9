"""Online DPO with the reward model in the loop (Qwen2 report, 4.3, the online stage).

In each episode the current policy answers a few prompts several times. The reward, by default the
reward model's, picks the most and the least preferred answer to each prompt, and one step of the
DPO loss learns from these pairs.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openqwen.engine import Engine, Output
from openqwen.model import Qwen2
from openqwen.support.batching import cut_to_budget
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
from openqwen.train.branches import pack_answers
from openqwen.train.compute import Precision, computing
from openqwen.train.dpo import DpoLossConfig, Pairs
from openqwen.train.losses import Loss, document_log_probs, token_log_probs
from openqwen.train.metrics import Entry
from openqwen.train.online import OnlineConfig, OnlineTraining
from openqwen.train.order import Epochs
from openqwen.train.parallel import World
from openqwen.train.preferences import COMPARED, PreferenceGroup
from openqwen.train.reward_sources import RewardSourcesConfig
from openqwen.train.rollouts import RolloutGroup
from openqwen.train.trainer import Place


class OnlineDpoConfig(DpoLossConfig, OnlineConfig):
    """Best against worst of several samples by the reward.

    The reports describe the scheme and give no numbers.
    """

    steps: int = Field(100, gt=0, description="episodes, one optimizer step each")
    rewards: RewardSourcesConfig = Field(
        default_factory=lambda: RewardSourcesConfig(sources=["reward"]),
        description="where rewards come from",
    )
    vote: bool = Field(
        False,
        description="weighted majority: an answer weighs the sum of σ(reward) over equal answers",
    )
    baseline: int = Field(
        1,
        ge=0,
        description="answers of the reference to each prompt, for the win rate in the log; 0: none",
    )


class OnlineDpoTraining(OnlineTraining):
    """One training by online DPO; an episode is one step."""

    def __init__(self, config: OnlineDpoConfig, *given: Any):
        """See `OnlineTraining`."""
        super().__init__(config, *given)
        self.config, count = config, len(self.pool.ids)
        epochs = config.steps * config.batch / count
        self._order = Epochs(count, epochs, config.batch, self.generators)
        engine = Engine(self.reference, self.tokenizer)
        self._baseline = self.rollouts_of(engine, engine.refresh, config.baseline)

    def batch(self, step: int) -> list[Pairs]:
        """Best and worst of this step's answers."""
        config, chosen = self.config, self._order.batch(step)
        groups = self.rollouts.step(step, chosen)
        self.note(step, groups)
        if config.baseline:
            self.notes["win_rate"] = win_rate(groups, self._baseline.step(step, chosen, "baseline"))
        self.notes |= divergence(
            self.model,
            self.reference,
            groups,
            config.micro_tokens,
            config.train.precision,
            self.world,
        )
        return best_and_worst_pairs(groups, config, self.device)

    def loss(self, pairs: Pairs) -> Loss:
        """The loss of the pairs, with the reference's log-probabilities of now."""
        with torch.no_grad():
            pairs.reference = document_log_probs(self.reference, pairs.rows)
        return pairs.loss(self.model, self.config, world=self.world)


def online_dpo(
    config: OnlineDpoConfig,
    start: Path,
    prompts: Path,
    tokenizer: Tokenizer,
    place: Place,
    reward_model: Path | None = None,
) -> dict[str, float]:
    """Improve the model at `start`, which is the reference too, on prompts; save to the output."""
    training = OnlineDpoTraining(config, start, prompts, tokenizer, place, reward_model)
    return training.run(config.steps)


def win_rate(groups: Sequence[RolloutGroup], baseline: Sequence[RolloutGroup]) -> float:
    """How often an answer has more reward than the reference's to its prompt; ties count half."""
    points = [
        (reward > other) + 0.5 * (reward == other)
        for group, against in zip(groups, baseline, strict=True)
        for reward in group.graded().rewards
        for other in against.graded().rewards
    ]
    return sum(points) / len(points) if points else math.nan


@torch.no_grad()
def divergence(
    model: Qwen2,
    reference: Qwen2,
    groups: Sequence[RolloutGroup],
    micro_tokens: int,
    precision: Precision,
    world: World,
) -> Entry:
    """Per token, the divergence from the reference (k3) and the entropy of the policy.

    Both are estimated on the first answer to each prompt, whose choice no reward has biased.
    """
    firsts = [group.outputs[0] for group in groups if group.outputs[0].written_ids]
    answers = [(output.prompt_ids, [output.written_ids]) for output in firsts]
    cuts = list(cut_to_budget([len(ids) + len(row) for ids, (row,) in answers], micro_tokens))
    sums = [0.0, 0.0, 0.0]
    for cut, counts in world.local_micro_batches(cuts):
        rows = pack_answers(answers[cut], model.device)
        with computing(precision, model.device):
            policy_N = token_log_probs(model, rows, world)
            difference_N = token_log_probs(reference, rows) - policy_N
        k3 = float((difference_N.exp() - difference_N - 1).sum())
        values = (k3, -float(policy_N.sum()), len(policy_N))
        sums = [total + value * counts for total, value in zip(sums, values)]
    kl, entropy, tokens = world.total(sums)
    return {"kl": kl / max(tokens, 1), "entropy": entropy / max(tokens, 1)}


def best_and_worst_pairs(
    rollouts: Sequence[RolloutGroup], config: OnlineDpoConfig, device: torch.device
) -> list[Pairs]:
    """Micro-batches of one pair for each prompt, without prompts whose answers do not differ."""
    groups = []
    for rollout in rollouts:
        if pair := best_and_worst(rollout.graded(), config.vote):
            best, worst = pair
            group = PreferenceGroup(best.prompt_ids)
            group.add(best.written_ids, worst.written_ids)
            groups.append(group.to_first_difference() if config.first_difference else group)
    cuts = cut_to_budget([group.size for group in groups], config.micro_tokens)
    return [Pairs.of(groups[cut], torch.empty(0), device) for cut in cuts]


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
    """A chat model, its own answers to prompts and a reward → an aligned one."""
    start, reward_model = run.inputs["model"], run.inputs.get("reward")
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
    help="DPO on the model's own answers, judged by a reward.",
    config=OnlineDpoConfig,
    inputs={"model": MODEL, "reward": REWARD, "prompts": PROMPTS},
    optional=["reward"],
    outputs=["model", CHAT],
    run=run_online_dpo,
    trains_on_ranks=True,
    estimate=_effort,
)
