"""The models that graders ask, as settings name them: in this process, or behind a server."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from openqwen.engine import Endpoint, Engine, Generator, Sampling
from openqwen.engine.score import RewardModel
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.hub import local
from openqwen.support.settings import Quantization, Settings
from openqwen.tasks.graders import GRADERS
from openqwen.tasks.models import GraderModel
from openqwen.tasks.task import Task
from openqwen.tokenizer import load_tokenizer


class GraderModelConfig(Settings):
    """A model that graders ask: a checkpoint, or a server with OpenAI's API."""

    model: Path | None = Field(
        None,
        description="a checkpoint: folder, .gguf file or hub id; for the grader `reward` a reward"
        " model, for `judge` a chat model",
    )
    quantize: Quantization | None = Field(
        None, description="of `judge`: quantise the weights when they are loaded"
    )
    url: str = Field(
        "", description="of `judge`: a server in place of a checkpoint, http://127.0.0.1:8000/v1"
    )
    name: str = Field("", description="the model's name at the server")
    max_tokens: int = Field(1024, ge=1, description="of `judge`: longest judgement, in tokens")
    temperature: float = Field(0.0, ge=0, description="of `judge`: sampling temperature")


@dataclass
class GraderModels:
    """Models by the names that tasks give them; each is loaded when it is first needed.

    Args:
        configs: settings by name.
        where: the settings' place, for errors.
        reward: the reward model's folder where the settings of "reward" name none.
    """

    configs: Mapping[str, GraderModelConfig]
    where: str
    reward: Path | None = None
    _loaded: dict[tuple[str, str], GraderModel] = field(default_factory=dict)

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise OpenQwenError where a task needs a model that the settings do not name."""
        for asks, name in {need: None for task in tasks if (need := _need(task))}:
            self._source(asks, name)

    def of(self, tasks: Iterable[Task]) -> dict[str, GraderModel]:
        """The models that these tasks need, for `grade`."""
        found = {}
        for need in {need: None for task in tasks if (need := _need(task))}:
            if need not in self._loaded:
                self._loaded[need] = self._load(*need)
            found[need[1]] = self._loaded[need]
        return found

    def _source(self, asks: str, name: str) -> tuple[GraderModelConfig, Path | None]:
        """The settings of a model and its checkpoint; None: a server's."""
        where = f"{self.where}.{name}"
        config = self.configs.get(name)
        if config is None and name == "reward" and self.reward:
            config = GraderModelConfig()
        if config is None:
            what = f"A task needs the model '{name}'.{suggestion(name, self.configs)}"
            do = "name its checkpoint (model) or its server (url, name) there"
            raise OpenQwenError(what, where, do)
        path = config.model
        if path is None and asks == "score" and name == "reward":
            path = self.reward
        if asks == "score" and path is None:
            what = f"The grader 'reward' needs a reward model, and '{name}' names no checkpoint."
            do = f"set {where}.model"
            raise OpenQwenError(what, where, f"{do}, or give --reward" if name == "reward" else do)
        if path is not None and config.url:
            what = f"'{name}' is a checkpoint and a server."
            raise OpenQwenError(what, where, "leave out model or url")
        if path is None and not (config.url and config.name):
            what = f"A task needs the model '{name}', and its checkpoint or server is not named."
            raise OpenQwenError(what, where, f"set {where}.model, or {where}.url and .name")
        return config, path

    def _load(self, asks: str, name: str) -> GraderModel:
        config, path = self._source(asks, name)
        sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        if path is None:
            identity = f"{config.url} {config.name}"
            return GraderModel(Endpoint(config.url, config.name), identity, sampling)
        if asks == "score":
            return GraderModel(RewardModel.load(local(path)))
        return GraderModel(_engine(local(path), config), sampling=sampling)


def _engine(path: Path, config: GraderModelConfig) -> Generator:
    device = "cpu" if config.quantize and best_device().type != "cuda" else best_device()
    model = load_model(path, device=device, quantize=config.quantize)
    return Engine(model, load_tokenizer(path))


def _need(task: Task) -> tuple[str, str] | None:
    """What a task's grader asks, "generate" or "score", and of which model; None: it asks none."""
    asks = GRADERS[task.grader].asks
    return (asks, task.reference.get("model", task.grader)) if asks else None
