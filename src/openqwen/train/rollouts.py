"""Rollouts: the current policy's answers to prompts, graded, shared over all ranks.

Each step of an online stage asks a few prompts several times:

    prompts of the step    0    7    3
    requests               0 0  7 7  3 3    `samples` of each
    rank                   0 1  0 1  0 1    each rank generates and grades its own
    groups                 [0 0][7 7][3 3]  every rank gets all of them, in the order of the prompts
"""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
from pydantic import Field

from openqwen.engine import Endpoint, Engine, Generator, Output, Prompt, Sampling
from openqwen.engine.workers import EngineSource, EngineWorkers
from openqwen.model import Qwen2, save_checkpoint
from openqwen.model.quantize import quantize
from openqwen.model.quantize import refresh as refresh_quantized
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, replace_folder
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.workers import WorkersConfig, WorkKind
from openqwen.tokenizer import Tokenizer
from openqwen.train.parallel import World, copy_weights, join
from openqwen.train.trainer import EpisodeError

Result = TypeVar("Result")
_RELOAD = 600.0  # seconds that a server may take to load new weights


class SamplerConfig(Settings):
    """What samples: engines of ours, or a server with OpenAI's API."""

    engine: WorkKind = Field(
        "single",
        exclude=True,  # not in the artifact's key: the answers do not depend on it
        description="where our engine runs: in this process, in several, or on a Ray cluster",
    )
    workers: WorkersConfig = Field(
        default_factory=WorkersConfig,
        exclude=True,
        description="the processes of engine processes and ray, for each rank",
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none", description="sample with rounded weights, on a CPU"
    )
    url: str = Field(
        "", description="base URL of the server, such as http://127.0.0.1:8000/v1; empty: none"
    )
    model: str = Field("policy", description="the model's name at the server")
    weights: Path | None = Field(
        None,
        description="folder that both see, for new weights: openqwen serve's --weights, or the"
        " folder that vLLM was started from; without it the server keeps its weights, and workers"
        " get theirs through the stage's own folder",
    )
    server: Literal["openqwen", "vllm"] = Field(
        "openqwen",
        description="how it is told: POST /update_weights, or vLLM's /collective_rpc"
        " (reload_weights; needs VLLM_SERVER_DEV_MODE=1)",
    )


# Rewards of answers. Arguments: the index of each answer's prompt, and the answers.
Grader = Callable[[Sequence[int], Sequence[Output]], list[float]]


@dataclass
class RolloutGroup:
    """The answers to one prompt, `samples` of them, and their rewards. prompt: its index.

    A reward is NaN where there is none.
    """

    prompt: int
    outputs: list[Output]
    rewards: list[float]

    def graded(self) -> "RolloutGroup":
        """The answers that have a reward."""
        pairs = [(o, r) for o, r in zip(self.outputs, self.rewards) if not math.isnan(r)]
        return RolloutGroup(self.prompt, [o for o, _ in pairs], [r for _, r in pairs])


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
        tokenizer: of the policy, for servers that return texts alone.
    """

    generator: Generator
    refresh: Callable[[int], None]
    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int
    grade: Grader
    seed: int
    world: World = field(default_factory=join)
    tokenizer: Tokenizer | None = None

    def step(
        self, step: int, chosen: Sequence[int], stream: str = "sampling"
    ) -> list[RolloutGroup]:
        """The groups of the chosen prompts, in their order, the same on every rank.

        The draws depend on the seed, the step, the stream's name and the place in the step alone: a
        resumed run draws what an uninterrupted one draws, on any number of ranks.

        Raises:
            EpisodeError: on every rank, where one of them could not generate or grade.
        """
        self._on_all(lambda: self.refresh(step))
        asked = [index for index in chosen for _ in range(self.samples)]
        seeds = Generators(self.seed)[f"{stream}.{step}"].integers(0, 2**62, len(asked))
        mine = slice(self.world.rank, None, self.world.size)
        prompts = [self.prompts[index] for index in asked[mine]]
        numbers = [int(seed) for seed in seeds[mine]]

        def answer() -> list[tuple[Output, float]]:
            made = self.generator.generate(prompts, self.sampling, numbers)
            outputs = [self._completed(output) for output in made]
            written = [n for n, output in enumerate(outputs) if output.written_ids]
            rewards = [math.nan] * len(outputs)
            found = self.grade([asked[mine][n] for n in written], [outputs[n] for n in written])
            for n, reward in zip(written, found, strict=True):
                rewards[n] = reward
            return list(zip(outputs, rewards))

        answers = self.world.gather(self._on_all(answer))
        assert len(answers) == len(asked)
        groups = []
        for number, index in enumerate(chosen):
            part = answers[number * self.samples : (number + 1) * self.samples]
            groups.append(RolloutGroup(index, [o for o, _ in part], [r for _, r in part]))
        return groups

    def _completed(self, output: Output) -> Output:
        """An answer with token ids, and log-probabilities under what each token was drawn from."""
        if output.finish_reason == "error":
            return Output(finish_reason="error")
        output = output.detached()
        if output.drawn_logprobs:  # of an engine of ours
            output.logprobs, output.drawn_logprobs = output.drawn_logprobs, []
        if self.tokenizer and output.text and not output.token_ids:
            output.token_ids = self.tokenizer.encode(output.text)
            output.logprobs = []
            output.stop_id = self.tokenizer.eos_id if output.finish_reason == "stop" else None
        return output

    def _on_all(self, work: Callable[[], Result]) -> Result:
        """This rank's result; an error of any rank is raised on all of them."""
        results, fault = [], None
        try:
            results.append(work())
        except OpenQwenError as error:
            fault = error.what, error.where, error.do
        if faults := [f for f in self.world.gather([fault]) if f]:
            raise EpisodeError(*faults[0])
        return results[0]


def policy_generator(
    model: Qwen2, tokenizer: Tokenizer, config: SamplerConfig, scratch: Path
) -> tuple[Generator, Callable[[int], None]]:
    """A generator with the weights of a model in training, and its `refresh`.

    Call this before the model is sharded. In one process our engine holds the very module that
    trains. Over several ranks, where that one is sharded, each rank holds a whole copy, which
    `refresh` fills.

    Args:
        scratch: the stage's folder, for checkpoints that worker processes load.

    Raises:
        OpenQwenError: both a server and workers are named.
    """
    world = join()
    copied = None if world.alone else copy.deepcopy(model).requires_grad_(False)
    whole = model if copied is None else copied
    if config.url or config.engine != "single":
        remote = _remote(config, scratch)
        sent = set[int]()

        def hand_over(step: int) -> None:
            if step in sent:
                return
            sent.add(step)
            if copied is not None:
                copy_weights(model, copied)
            if isinstance(remote, EngineWorkers):
                folder = remote.source.path.parent
                if world.main:
                    save_weights(whole, tokenizer, folder, step)
                # The workers load it when they are asked; then it is complete on every rank.
                remote.source = replace(remote.source, path=folder / str(step), version=step)
            elif world.main and config.weights:
                send_weights(whole, tokenizer, config, step)

        return remote, hand_over
    rounded = None if config.quantize == "none" else quantize(whole, config.quantize)
    engine = Engine(rounded or whole, tokenizer)

    def refresh(step: int) -> None:
        if copied is not None:
            copy_weights(model, copied)
        if rounded is not None:
            refresh_quantized(rounded, whole)
        engine.refresh(step)

    return engine, refresh


def _remote(config: SamplerConfig, scratch: Path) -> Endpoint | EngineWorkers:
    if not config.url:
        folder = config.weights or scratch / "weights"
        kind = None if config.quantize == "none" else config.quantize
        return EngineWorkers(EngineSource(folder / "0", kind), config.engine, config.workers)
    if config.engine != "single":
        what = "Either workers sample, or a server."
        raise OpenQwenError(what, "sampler.engine, sampler.url", "give one of the two")
    return Endpoint(config.url, config.model)


def save_weights(model: Qwen2, tokenizer: Tokenizer, folder: Path, version: int) -> None:
    """Save a checkpoint as the subfolder of that number; remove those of smaller numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = fresh_folder(folder / ".aside")
    save_checkpoint(model, tokenizer, aside)
    replace_folder(aside, folder / str(version))
    for old in [path for path in folder.iterdir() if path.name.isdecimal()]:
        if int(old.name) < version:
            shutil.rmtree(old)


def send_weights(model: Qwen2, tokenizer: Tokenizer, config: SamplerConfig, version: int) -> None:
    """Save a checkpoint where a server finds it, and tell the server to load it.

    Raises:
        OpenQwenError: the server does not answer or refuses.
    """
    folder = config.weights
    assert folder is not None
    root = config.url.rstrip("/").removesuffix("/v1")
    calls: list[tuple[str, Any]]
    if config.server == "vllm":
        aside = fresh_folder(folder / ".aside")
        save_checkpoint(model, tokenizer, aside)
        for file in aside.iterdir():
            file.replace(folder / file.name)
        aside.rmdir()
        calls = [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})]
    else:
        save_weights(model, tokenizer, folder, version)
        calls = [("/update_weights", {"version": version})]
    for path, body in calls:
        try:
            response = httpx.post(root + path, json=body, timeout=_RELOAD)
            problem = "" if response.is_success else f"{response.status_code}: {response.text:.200}"
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            what = f"The server did not take the weights of step {version}: {problem}"
            raise OpenQwenError(what, root + path, "look at its log; then run the command again")
