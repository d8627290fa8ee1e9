"""Group relative policy optimisation, Qwen2.5's online stage.

Qwen2.5 report, section 4.3; Shao et al. 2024 (DeepSeekMath). In each episode the policy answers a
few prompts eight times. An answer's advantage is its reward against those of the answers beside it.
Prompts come in the order of the variance of their rewards under the model at the start, the highest
first.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import pvariance
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openqwen.support.batching import cut_to_budget
from openqwen.support.files import read_jsonl, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
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
from openqwen.train import losses
from openqwen.train.branches import pack_answers
from openqwen.train.compute import computing
from openqwen.train.losses import (
    Aggregate,
    Loss,
    group_advantages,
    token_advantages,
    token_log_probs,
)
from openqwen.train.online import OnlineConfig, OnlineTraining
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.preferences import COMPARED
from openqwen.train.rollouts import RolloutGroup
from openqwen.train.trainer import Place

# Of each variant: how the loss is summed up, and whether advantages are over the deviation.
_VARIANTS: dict[str, tuple[Aggregate, bool]] = {
    "grpo": ("answer", True),
    "dapo": ("token", True),
    "dr-grpo": ("constant", False),
}


class GrpoConfig(OnlineConfig):
    """8 answers to a query, one step of 2,048 answers an episode, as Qwen2.5.

    Its rate, divergence weight and clip are not published: rate and weight are Qwen2.5-Math's.
    """

    episodes: int = Field(100, gt=0, description="episodes, each with fresh samples")
    batch: int = Field(256, gt=0, description="prompts of one episode")
    updates: int = Field(
        1, gt=0, description="optimizer steps of an episode, each on its share of the prompts"
    )
    order: Literal["variance", "shuffle"] = Field(
        "variance",
        description="variance: the start model answers all prompts once more before training, and"
        " those whose rewards vary most come first",
    )
    refill: int = Field(
        0,
        ge=0,
        description="most rounds in which prompts whose answers all have one reward are replaced by"
        " others (DAPO's dynamic sampling); 0 keeps them",
    )
    variant: Literal["grpo", "dapo", "dr-grpo"] = Field(
        "grpo",
        description="grpo: the mean over each answer's tokens. dapo: over all tokens alike."
        " dr-grpo: the sum over max_tokens, and advantages not over their deviation",
    )
    credit: Literal["answer", "token"] = Field(
        "answer",
        description="answer: all tokens have the answer's advantage, as in GRPO. token: each has"
        " what it adds, seen by the answers that share its beginning",
    )
    beta: float = Field(1e-3, ge=0, description="weight of the divergence from the reference (k3)")
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below 1 minus this")
    clip_high: float = Field(0.2, gt=0, description="and above 1 plus this; DAPO takes 0.28")
    importance_cap: float = Field(
        2.0,
        ge=0,
        description="largest weight that corrects for a sampler whose probabilities differ"
        " (a server, rounded weights); 0: no correction",
    )
    mask_truncated: bool = Field(
        False, description="learn nothing from answers that max_tokens cut off"
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5), description="optimizer"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sampler.url and self.importance_cap and self.temperature != 1:
            raise ValueError(
                "servers report log-probabilities at temperature 1: set it, or importance_cap to 0"
            )
        if self.batch % self.updates:
            raise ValueError("batch must be a multiple of updates")
        return self


@dataclass
class AnswerRows:
    """A micro-batch of answers with N tokens together, each prompt computed once.

    advantages: of the tokens, [N]. sampler: log-probabilities that the sampler reported, [N], NaN
    where it did not. old: the trainer's, before the episode's first step, where there are several.
    """

    rows: PackedBatch
    advantages: Tensor
    sampler: Tensor
    old: Tensor | None = None

    @classmethod
    def of(
        cls, groups: Sequence["AdvantageGroup"], device: torch.device | str = "cpu"
    ) -> "AnswerRows":
        """Pack groups."""
        prompts = [(g.prompt, [list(answer) for answer in g.answers]) for g in groups]
        advantages = [value for g in groups for values in g.advantages for value in values]
        sampler = [value for g in groups for values in g.sampler for value in values]
        rows = pack_answers(prompts, device)
        return cls(
            rows, torch.tensor(advantages, device=device), torch.tensor(sampler, device=device)
        )


@dataclass
class AdvantageGroup:
    """A prompt and answers to it as token ids, with their advantages and the sampler's numbers."""

    prompt: list[int]
    answers: list[list[int]]
    advantages: list[list[float]]
    sampler: list[list[float]]

    @property
    def size(self) -> int:
        """Tokens, the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.answers))

    @classmethod
    def of(
        cls, group: RolloutGroup, scale: bool, by_token: bool = False, mask_truncated: bool = False
    ) -> Self:
        """The answers of a group that have a reward.

        An answer without a reward has no part in the mean either; a masked one has.
        """
        graded = group.graded()
        whole = group_advantages(graded.rewards, scale) if graded.rewards else []
        written = [output.written_ids for output in graded.outputs]
        advantages = [[value] * len(ids) for ids, value in zip(written, whole)]
        if by_token and written:
            advantages = token_advantages(written, whole)
        made = cls(graded.outputs[0].prompt_ids if graded.outputs else [], [], [], [])
        for output, ids, values in zip(graded.outputs, written, advantages):
            if mask_truncated and output.finish_reason == "length":
                continue
            made.answers.append(ids)
            made.advantages.append(values)
            known = output.logprobs if len(output.logprobs) <= len(ids) else []
            made.sampler.append([*known, *[math.nan] * (len(ids) - len(known))])
        return made

    def pieces(self, micro_tokens: int) -> list["AdvantageGroup"]:
        """The group, cut where it is larger than a micro-batch; each piece has the prompt."""
        room = max(1, micro_tokens - len(self.prompt))
        return [
            AdvantageGroup(self.prompt, self.answers[cut], self.advantages[cut], self.sampler[cut])
            for cut in cut_to_budget([len(answer) for answer in self.answers], room)
        ]


def varies(group: RolloutGroup) -> bool:
    """Whether the rewards of a group differ, so that it teaches something."""
    rewards = group.graded().rewards
    return any(group_advantages(rewards)) if rewards else False


class GrpoTraining(OnlineTraining):
    """One training by GRPO. chosen: the prompts of all episodes, in their order."""

    def __init__(
        self,
        config: GrpoConfig,
        start: Path,
        prompts: Path,
        tokenizer: Tokenizer,
        place: Place,
        reward_model: Path | None,
    ):
        """See `OnlineTraining`."""
        given = config, start, prompts, tokenizer, place, reward_model
        super().__init__(*given, needs_reference=config.beta > 0)
        self.config = config
        self._aggregate, self._scale = _VARIANTS[config.variant]
        self._parts: list[list[AnswerRows]] = []
        self.chosen = self._order()

    def batch(self, step: int) -> list[AnswerRows]:
        """The micro-batches of a step; an episode's first step samples."""
        episode, part = divmod(step, self.config.updates)
        if part == 0:
            self._parts = self._sample(episode)
        return self._parts[part]

    def _sample(self, episode: int) -> list[list[AnswerRows]]:
        """The micro-batches of each step of an episode."""
        config = self.config
        first = episode * config.batch
        groups = self.rollouts.step(episode, self.chosen[first : first + config.batch])
        self.note(episode, groups)
        constant = sum(not varies(group) for group in groups)
        self.notes["without_variance"] = constant / len(groups)
        if config.refill:
            groups, self.notes["refilled"] = self._refilled(episode, groups)
        share = config.batch // config.updates
        parts = []
        for start in range(0, config.batch, share):
            made = [
                AdvantageGroup.of(
                    group, self._scale, config.credit == "token", config.mask_truncated
                )
                for group in groups[start : start + share]
            ]
            pieces = [piece for group in made for piece in group.pieces(config.micro_tokens)]
            cuts = cut_to_budget([piece.size for piece in pieces], config.micro_tokens)
            parts.append([AnswerRows.of(pieces[cut], self.device) for cut in cuts])
        if config.updates > 1:
            self._note_old(parts)
        return parts

    def _refilled(
        self, episode: int, groups: list[RolloutGroup]
    ) -> tuple[list[RolloutGroup], float]:
        """Groups with variance in place of those without, as far as rounds and prompts allow."""
        draw = Generators(self.place.seed)[f"refill.{episode}"]
        used = {group.prompt for group in groups}
        spare = [int(i) for i in draw.permutation(len(self.pool.ids)) if i not in used]
        replaced = 0
        for number in range(self.config.refill):
            missing = [place for place, group in enumerate(groups) if not varies(group)]
            asked, spare = spare[: len(missing)], spare[len(missing) :]
            if not asked:
                break
            fresh = filter(varies, self.rollouts.step(episode, asked, f"refill-{number}"))
            for place, group in zip(missing, fresh):
                groups[place] = group
                replaced += 1
        return groups, replaced / len(groups)

    @torch.no_grad()
    def _note_old(self, parts: Sequence[Sequence[AnswerRows]]) -> None:
        """Log-probabilities before the episode's first step, of this rank's micro-batches."""
        for micros in parts:
            for micro, _ in self.world.local_micro_batches(micros):
                with computing(self.config.train.precision, self.device):
                    micro.old = self._log_probs(micro)

    def _log_probs(self, micro: AnswerRows) -> Tensor:
        return token_log_probs(self.model, micro.rows, self.world, self.config.temperature)

    def loss(self, micro: AnswerRows) -> Loss:
        """The loss of a micro-batch."""
        config, reference = self.config, None
        if config.beta:
            with torch.no_grad():
                reference = token_log_probs(
                    self.reference, micro.rows, temperature=config.temperature
                )
        differs = config.sampler.url or config.sampler.quantize != "none"
        return losses.grpo(
            self._log_probs(micro),
            micro.advantages,
            micro.rows.counts,
            micro.old,
            reference,
            micro.sampler if differs and config.importance_cap else None,
            beta=config.beta,
            clip=(config.clip_low, config.clip_high),
            aggregate=self._aggregate,
            longest=config.max_tokens,
            cap=config.importance_cap,
        )

    def _order(self) -> list[int]:
        """The prompts of all episodes in their order."""
        config = self.config
        count, asked = len(self.pool.ids), config.episodes * config.batch
        if config.order == "shuffle":
            epochs = Epochs(count, asked / count, config.batch, self.generators)
            return [i for step in range(epochs.steps) for i in epochs.batch(step)]
        deviations = self._deviations()
        ranked = sorted(range(count), key=lambda i: -deviations[i])
        return [ranked[n % count] for n in range(asked)]

    def _deviations(self) -> list[float]:
        """The variance of the rewards of each prompt's answers by the model at the start."""
        path, count = self.place.scratch / "variance.jsonl", len(self.pool.ids)
        known = list(read_jsonl(path)) if path.exists() else []
        self.world.barrier()  # every rank has read the file
        with progress(f"{self.place.label} order", count, "prompts", done=len(known)) as bar:
            while len(known) < count:
                part = range(len(known), min(count, len(known) + self.config.batch))
                for group in self.rollouts.step(0, part, f"order.{len(known)}"):
                    rewards = group.graded().rewards
                    known.append({"variance": pvariance(rewards) if len(rewards) > 1 else -1.0})
                if self.world.main:
                    write_jsonl(path, known)
                bar.advance(len(part))
        return [entry["variance"] for entry in known]


def grpo(
    config: GrpoConfig,
    start: Path,
    prompts: Path,
    tokenizer: Tokenizer,
    place: Place,
    reward_model: Path | None = None,
) -> dict[str, float]:
    """Improve the model at `start`, which is the reference too, on prompts; save to the output."""
    training = GrpoTraining(config, start, prompts, tokenizer, place, reward_model)
    return training.run(config.episodes, config.updates)


def run_grpo(run: StageRun) -> dict[str, float]:
    """A chat model and prompts with graders, or a reward model → an aligned one."""
    start, tokenizer = run.inputs["model"], load_tokenizer(run.inputs["model"])
    return grpo(
        run.config, start, run.data("prompts"), tokenizer, Place.of(run), run.inputs.get("reward")
    )


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    config = recipe.grpo
    asked = config.episodes * config.batch
    rounds = 1 + (config.order == "variance")
    return Effort(
        answers=rounds * asked * config.samples,
        rows={CONVERSATION: asked * COMPARED * config.samples / 2},
        micro_tokens=config.micro_tokens,
        longest=config.micro_tokens,
        data_from="grpo",
        beside=int(config.beta > 0) + int("reward" in config.rewards.weights),
    )


STAGE = Stage(
    name="grpo",
    help="GRPO on the model's own answers, by graders or rewards.",
    config=GrpoConfig,
    inputs={"model": MODEL, "prompts": PROMPTS, "reward": REWARD},
    optional=["reward"],
    outputs=["model", CHAT],
    run=run_grpo,
    trains_on_ranks=True,
    estimate=_effort,
)
