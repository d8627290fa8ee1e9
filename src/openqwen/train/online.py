"""What the stages share that learn from a model's own answers: online DPO and GRPO."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from openqwen.engine import Sampling
from openqwen.model import Qwen2
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl, write_jsonl
from openqwen.support.records import Record, read_records
from openqwen.support.settings import Settings
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.messages import prompt
from openqwen.train.conversations import encode_prompt
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packing import MicroBatchConfig
from openqwen.train.parallel import copy_weights, full_tensor
from openqwen.train.reward_sources import RewardSourcesConfig
from openqwen.train.rollouts import RolloutGroup, SamplerConfig
from openqwen.train.trainer import TrainingConfig

SAMPLES = "samples.jsonl"


class ReferenceConfig(Settings):
    """The reference model: the start, or a later policy."""

    refresh: Literal["never", "copy", "average"] = Field(
        "never",
        description="copy: the policy becomes the reference after every `every` episodes. average:"
        " a moving average of the policy, after each episode",
    )
    every: int = Field(10, ge=1, description="copy: episodes between two copies")
    decay: float = Field(0.99, ge=0, lt=1, description="average: share of the old reference kept")


class OnlineConfig(MicroBatchConfig, TrainingConfig):
    """The settings of the stages that learn from their own answers."""

    batch: int = Field(32, gt=0, description="prompts of one episode")
    samples: int = Field(8, gt=1, description="answers sampled for each prompt")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    max_tokens: int = Field(512, gt=0, description="longest answer, in tokens")
    rewards: RewardSourcesConfig = Field(
        default_factory=RewardSourcesConfig, description="where rewards come from"
    )
    reference: ReferenceConfig = Field(
        default_factory=ReferenceConfig, description="the reference model"
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="what samples")
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer"
    )

    @property
    def sampling(self) -> Sampling:
        """How an answer is sampled."""
        return Sampling(max_tokens=self.max_tokens, temperature=self.temperature)


class PromptPool:
    """The prompts of a source (see `read_records`), as records and as token ids.

    longest: most tokens of a prompt; longer ones are left out. too_long: how many those are.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, longest: int):
        self.records: list[Record] = []
        self.ids: list[list[int]] = []
        self.too_long = 0
        for where, record in read_records(path):
            ids = encode_prompt(tokenizer, record, where)
            if len(ids) > longest:
                self.too_long += 1
            else:
                self.records.append(record)
                self.ids.append(ids)
        if not self.ids:
            do = "lower max_tokens, or give shorter prompts" if self.too_long else "give some"
            what = "There are no prompts to answer"
            what += f": {self.too_long} are longer than {longest} tokens." if self.too_long else "."
            raise OpenQwenError(what, where=path, do=do)


@torch.no_grad()
def move_reference(config: ReferenceConfig, episodes: int, model: Qwen2, reference: Qwen2) -> None:
    """Change the reference as it is to be after so many episodes; every rank calls it."""
    if config.refresh == "copy" and episodes % config.every == 0:
        copy_weights(model, reference)
    if config.refresh == "average":
        targets = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            targets[name].lerp_(full_tensor(parameter.detach()), 1 - config.decay)


def summary(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the log says of an episode's answers; rewards are of those that have one."""
    outputs = [output for group in groups for output in group.outputs]
    rewards = [reward for group in groups for reward in group.graded().rewards]
    cut = sum(output.finish_reason == "length" for output in outputs)
    return {
        "reward": math.fsum(rewards) / len(rewards) if rewards else math.nan,
        "length": sum(len(output.token_ids) for output in outputs) / len(outputs),
        "truncated": cut / len(outputs),
        "bad_rewards": float(len(outputs) - len(rewards)),
    }


def log_samples(
    scratch: Path, step: int, groups: Sequence[RolloutGroup], records: Sequence[Record]
) -> None:
    """Add the best and the worst answer to an episode's first prompts to the samples.

    Samples of this step and of later ones, which a killed run wrote, leave the file.
    """
    path, lines = scratch / SAMPLES, list[dict[str, Any]]()
    if path.exists():
        lines = [line for line in read_jsonl(path) if line["step"] < step]
    for group in groups[:2]:
        graded = group.graded()
        ranked = sorted(range(len(graded.rewards)), key=lambda n: graded.rewards[n])
        question = prompt(records[group.prompt])[0][-1]["content"]
        for n in dict.fromkeys([ranked[-1], ranked[0]] if ranked else []):
            answer = {"step": step, "prompt": question, "answer": graded.outputs[n].text}
            answer |= {"reward": graded.rewards[n], "versions": graded.outputs[n].versions}
            lines.append(answer)
    write_jsonl(path, lines)
