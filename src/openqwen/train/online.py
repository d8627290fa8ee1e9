"""What the stages share that learn from a model's own answers: online DPO and GRPO."""

import copy
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from openqwen.engine import Generator, Output, Sampling
from openqwen.engine.workers import EngineWorkers
from openqwen.model import Qwen2, load_model
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, located
from openqwen.support.files import read_jsonl, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.records import Record, read_records
from openqwen.support.settings import Settings
from openqwen.tasks import read_problems
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.messages import prompt
from openqwen.train.adapters import merged_network
from openqwen.train.conversations import encode_prompt
from openqwen.train.losses import Loss
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packing import MicroBatchConfig
from openqwen.train.parallel import copy_weights, full_tensor, join
from openqwen.train.reward_sources import RewardSources, RewardSourcesConfig
from openqwen.train.rollouts import RolloutGroup, Rollouts, SamplerConfig, policy_generator
from openqwen.train.trainer import Place, Trainer, TrainingConfig

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

    form: Literal["records", "gsm8k", "math", "humaneval", "mbpp", "ifeval"] = Field(
        "records",
        description="form of the prompts: records (prompts, conversations, tasks), or problems as"
        " they were published",
    )
    system: str = Field("", description="system message of prompts that have none")
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
    lora: LoraConfig = Field(
        default_factory=lambda: LoraConfig(rank=0),
        description="train adapters in place of all weights; rank 0: none",
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="what samples")
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=7e-7), description="optimizer"
    )

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.lora.rank and (self.lora.base != "none" or self.reference.refresh != "never"):
            raise ValueError(
                "adapters need exact weights under them and a reference that stays: leave lora.base"
                " and reference.refresh as they are"
            )
        return self


def read_prompts(path: Path, form: str, system: str) -> Iterator[tuple[str, Record]]:
    """Each prompt of a source as a record, with its place.

    form: "records" (see `read_records`), or the name of a reader of problems. system: a message for
    prompts without one; "": none.
    """
    records = read_records(path)
    if form != "records":
        records = ((f"{path}, {task.id}", asdict(task)) for task in read_problems(form, path))
    for where, record in records:
        if system:
            with located(where):
                asked, _ = prompt(record)
            if asked[0]["role"] != "system":
                record = record | {"prompt": [{"role": "system", "content": system}, *asked]}
        yield where, record


class PromptPool:
    """The prompts of a stage, as records and as token ids.

    longest: most tokens of a prompt; longer ones are left out. too_long: how many those are.
    """

    def __init__(
        self, prompts: Iterable[tuple[str, Record]], path: Path, tokenizer: Tokenizer, longest: int
    ):
        self.records: list[Record] = []
        self.ids: list[list[int]] = []
        self.too_long = 0
        for where, record in prompts:
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


class OnlineTraining(ABC):
    """One training on a model's own answers: networks, prompts, rewards, rollouts, and the log.

    notes: what the log says of the present episode.
    """

    def __init__(
        self,
        config: OnlineConfig,
        start: Path,
        prompts: Path,
        tokenizer: Tokenizer,
        place: Place,
        reward_model: Path | None,
        needs_reference: bool = True,
    ):
        place.scratch.mkdir(parents=True, exist_ok=True)
        self.place, self.tokenizer, self.device = place, tokenizer, best_device()
        self.generators = Generators(place.seed)
        self.model = load_model(start, device=self.device)
        self.world = join().with_mesh(config.train.parallel, self.model)
        self.reference = self.model
        if needs_reference:
            # Under adapters the weights never change, so both networks have the same ones.
            shared = {id(p): p for p in self.model.parameters()} if config.lora.rank else {}
            self.reference = copy.deepcopy(self.model, shared).requires_grad_(False)
        self._start = start
        if config.lora.rank:
            add_adapters(self.model, config.lora, self.generators.torch("lora"))
        self._online, self.notes = config, dict[str, float]()
        self._moves = needs_reference and config.reference.refresh != "never"
        window = self.model.config.max_position_embeddings
        records = read_prompts(prompts, config.form, config.system)
        self.pool = PromptPool(records, prompts, tokenizer, window - config.max_tokens)
        quarantine = place.scratch / f"bad_rewards.{self.world.rank}.jsonl"
        self._rewards = RewardSources(
            config.rewards, tokenizer, quarantine, reward_model, config.micro_tokens
        )
        self._rewards.check(self.pool.records)
        sampler = policy_generator(self.model, tokenizer, config.sampler, place.scratch)
        self.rollouts = self.rollouts_of(*sampler, config.samples)

    def rollouts_of(
        self, generator: Generator, refresh: Callable[[int], None], samples: int
    ) -> Rollouts:
        """Rollouts of the prompts by a generator, with the training's rewards."""

        def grade(chosen: Sequence[int], outputs: Sequence[Output]) -> list[float]:
            return self._rewards([self.pool.records[index] for index in chosen], outputs)

        sampling = Sampling(
            max_tokens=self._online.max_tokens, temperature=self._online.temperature
        )
        return Rollouts(
            generator,
            refresh,
            self.pool.ids,
            sampling,
            samples,
            grade,
            self.place.seed,
            tokenizer=self.tokenizer,
        )

    @abstractmethod
    def batch(self, step: int) -> Sequence[Any]:
        """The micro-batches of a step."""

    @abstractmethod
    def loss(self, micro: Any) -> Loss:
        """The loss of a micro-batch."""

    def run(self, episodes: int, updates: int = 1) -> dict[str, float]:
        """Train so many episodes of so many steps; save to the output; returns the metrics."""

        def after(step: int) -> dict[str, float]:
            done, part = divmod(step + 1, updates)
            if part == 0 and self._moves:
                move_reference(self._online.reference, done, self.model, self.reference)
            return self.notes

        trainer = Trainer(
            self.place,
            self._online,
            self.model,
            self.batch,
            self.loss,
            episodes * updates,
            self.generators,
            world=self.world,
            episode=updates,
            beside=self.reference if self._moves else None,
            after=after,
        )
        try:
            metrics = trainer.run()
        finally:
            if isinstance(self.rollouts.generator, EngineWorkers):
                self.rollouts.generator.close()
        if self._online.lora.rank:
            trainer.full_model = merged_network(trainer, self._online.lora, self._start)
        trainer.save_checkpoint(self.tokenizer)
        if self.world.main:
            shutil.copyfile(self.place.scratch / SAMPLES, self.place.output / SAMPLES)
        return metrics | {"prompts": len(self.pool.ids), "too_long": self.pool.too_long}

    def note(self, episode: int, groups: Sequence[RolloutGroup]) -> None:
        """Note an episode's answers for the log; rewards are of those that have one."""
        outputs = [output for group in groups for output in group.outputs]
        rewards = [reward for group in groups for reward in group.graded().rewards]
        cut = sum(output.finish_reason == "length" for output in outputs)
        self.notes = {
            "reward": math.fsum(rewards) / len(rewards) if rewards else math.nan,
            "length": sum(len(output.token_ids) for output in outputs) / len(outputs),
            "truncated": cut / len(outputs),
            "bad_rewards": float(len(outputs) - len(rewards)),
        }
        if self.world.main:
            log_samples(self.place.scratch, episode, groups, self.pool.records)


@torch.no_grad()
def move_reference(config: ReferenceConfig, episodes: int, model: Qwen2, reference: Qwen2) -> None:
    """Change the reference as it is to be after so many episodes; every rank calls it."""
    if config.refresh == "copy" and episodes % config.every == 0:
        copy_weights(model, reference)
    if config.refresh == "average":
        targets = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            targets[name].lerp_(full_tensor(parameter.detach()), 1 - config.decay)


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
