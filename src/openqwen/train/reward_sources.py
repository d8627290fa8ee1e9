"""Rewards of answers, from one source or the weighted sum of several.

A source is a reward model, the graders of tasks, a Python function, or an HTTP endpoint. GRPO,
online DPO and synthesis use the same ones. An answer for which a source gives no finite number is
counted and written to a file, and has no reward; the others of its call keep theirs.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from openqwen.engine import Output
from openqwen.engine.score import score_sequences
from openqwen.model import load_scorer
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.records import Record
from openqwen.support.settings import Settings
from openqwen.tasks import Task, grade
from openqwen.tasks.grader_models import GraderModelConfig, GraderModels
from openqwen.tasks.graders import check_task
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.messages import prompt
from openqwen.train.conversations import encode_answer

_CALL = 64  # most answers of one call of a function or an endpoint
_START = 120.0  # seconds for a function's module to be imported


class RewardSourcesConfig(Settings):
    """Where rewards come from, and what to do with an answer that gets none."""

    sources: list[str] = Field(
        ["grader"],
        description="SOURCE or SOURCE=WEIGHT. grader: the grader that each prompt names, with its"
        " `reference`; `models` are those that graders ask. reward: the reward model that the stage"
        " is given. module:function: called as function(records, answers) -> numbers, in a process"
        ' of its own. http://...: gets {"conversations", "records"}, returns {"rewards": [...]} or'
        " what /score of `openqwen serve` returns. Anything else: the folder of a reward model",
    )
    shaping: Literal["sum", "qwen-math"] = Field(
        "sum",
        description="how they add up. qwen-math: sigmoid(0.5 * reward model) + (grader - 1), as in"
        " Qwen2.5-Math: a right answer has more than any wrong one",
    )
    models: dict[str, GraderModelConfig] = Field(
        default_factory=lambda: {"judge": GraderModelConfig(), "reward": GraderModelConfig()},
        description="the models that graders ask: a task's reference names one with `model`, else"
        " the grader's own name is taken; `reward` is the stage's reward model where none is given",
    )
    seconds: float = Field(
        60.0, gt=0, description="most seconds of one call of a function or an endpoint"
    )
    bad: Literal["skip", "stop"] = Field(
        "skip", description="an answer without a reward: go on without it, or stop"
    )
    most_bad: float = Field(
        0.1, ge=0, le=1, description="skip: stop if more than this share of a step's answers is bad"
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """A mapping of sources to weights, as YAML may write it, as a list."""
        if isinstance(given, Mapping):
            return [f"{name}={weight}" for name, weight in given.items()]
        return given

    @property
    def weights(self) -> dict[str, float]:
        """Source -> weight, 1 where none is given."""
        found = {}
        for text in self.sources:
            name, _, weight = text.rpartition("=")
            if name and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", weight):
                found[name] = float(weight)
            else:
                found[text] = 1.0
        return found


class RewardSource(Protocol):
    """Rewards of answers to records, one each; a text says why there is none."""

    def __call__(
        self, records: Sequence[Record], outputs: Sequence[Output]
    ) -> list[float | str]: ...


@dataclass
class RewardSources:
    """The rewards that a configuration describes.

    Args:
        config: the sources.
        tokenizer: of the policy; None: each reward model has its own.
        quarantine: a file that gets a line for each answer without a reward.
        reward_model: the folder of the source `reward`.
        micro_tokens: tokens of one forward call of a reward model.
    """

    config: RewardSourcesConfig
    tokenizer: Tokenizer | None
    quarantine: Path
    reward_model: Path | None = None
    micro_tokens: int = 8_192

    def __post_init__(self) -> None:
        self._weights = sources = self.config.weights
        self._models = GraderModels(self.config.models, "rewards.models", self.reward_model)
        if not sources:
            do = "name one, such as grader"
            raise OpenQwenError("There is no reward.", where="rewards.sources", do=do)
        self._sources = {name: self._source(name) for name in sources}
        kinds = sorted(_kind(name) for name in sources if _kind(name) != "called")
        if self.config.shaping == "qwen-math" and kinds != ["grader", "model"]:
            raise OpenQwenError(
                "qwen-math shapes the reward of one reward model by one grader.",
                where="rewards.sources",
                do="name reward and grader, such as: --rewards.sources reward grader",
            )

    def _source(self, name: str) -> RewardSource:
        kind = _kind(name)
        if kind == "grader":
            return self._graded
        if kind == "called":
            return CalledReward(name, self.config.seconds)
        folder = self.reward_model if name == "reward" else Path(name)
        if folder is None:
            do = "give --reward FOLDER"
            raise OpenQwenError("There is no reward model.", where="rewards.sources", do=do)
        if not (folder / "config.json").is_file():
            known = ("grader", "reward")
            what = f"There is no reward '{name}'.{suggestion(name, known)}"
            do = "name grader, reward, module:function, a URL, or a reward model's folder"
            raise OpenQwenError(what, where="rewards.sources", do=do)
        return ModelReward(folder, self.tokenizer or load_tokenizer(folder), self.micro_tokens)

    def check(self, records: Iterable[Record]) -> None:
        """Raise OpenQwenError where a grader cannot grade a record, before anything is sampled."""
        if "grader" in self._sources:
            self._models.check(map(record_task, records))

    def _graded(self, records: Sequence[Record], outputs: Sequence[Output]) -> list[float | str]:
        """The scores of the records' own graders, 0 to 1."""
        tasks = [record_task(record) for record in records]
        answers = [output.text.strip() for output in outputs]
        grades = grade(tasks, answers, models=self._models.of(tasks))
        return [g.score if g.counts else f"the grader failed: {g.reason}" for g in grades]

    def __call__(self, records: Sequence[Record], outputs: Sequence[Output]) -> list[float]:
        """The reward of each answer; NaN where a source gave none.

        records: the record of each answer's prompt.

        Raises:
            OpenQwenError: there are more answers without a reward than the configuration allows.
        """
        given = {name: source(records, outputs) for name, source in self._sources.items()}
        rewards, faults = [], []
        for index, (record, output) in enumerate(zip(records, outputs, strict=True)):
            parts = {name: values[index] for name, values in given.items()}
            total = self._combined({k: v for k, v in parts.items() if not isinstance(v, str)})
            bad = {name: value for name, value in parts.items() if isinstance(value, str)}
            if not bad and not math.isfinite(total):
                bad = {name: f"the reward is {value}" for name, value in parts.items()}
            rewards.append(math.nan if bad else total)
            if bad:
                faults.append({"reasons": bad, "record": record, "answer": output.text})
        self._note(faults, len(outputs))
        return rewards

    def _combined(self, parts: dict[str, float]) -> float:
        """The weighted sum, or the shaped one, in which weights count for other sources only."""
        if self.config.shaping == "sum" or len(parts) < len(self._sources):
            return sum(self._weights[name] * part for name, part in parts.items())
        shaped = 0.0
        for name, part in parts.items():
            kind = _kind(name)
            if kind == "model":
                shaped += 1 / (1 + math.exp(-0.5 * max(part, -1_000.0)))
            elif kind == "grader":
                shaped += float(part == 1.0) - 1.0
            else:
                shaped += self._weights[name] * part
        return shaped

    def _note(self, faults: Sequence[dict[str, Any]], answers: int) -> None:
        """Write bad answers down; stop if there are too many."""
        if not faults:
            return
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        with open(self.quarantine, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(f, ensure_ascii=False, default=str) + "\n" for f in faults)
        allowed = 0.0 if self.config.bad == "stop" else self.config.most_bad * answers
        if len(faults) > allowed:
            name, reason = next(iter(faults[0]["reasons"].items()))
            raise OpenQwenError(
                f"{len(faults)} of {answers} answers have no reward. The first one, by {name}:"
                f" {reason}",
                where=self.quarantine,
                do="mend the reward; or set rewards.bad to skip, or raise rewards.most_bad",
            )


def _kind(name: str) -> str:
    if name == "grader":
        return "grader"
    is_called = re.match(r"https?://", name) or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)
    return "called" if is_called else "model"


def record_task(record: Record) -> Task:
    """The task that a record of a prompt describes.

    Raises:
        OpenQwenError: it names no grader, or its reference does not fit the grader.
    """
    if "grader" not in record:
        do = "give tasks as prompts, or another source in rewards.sources"
        raise OpenQwenError("This prompt names no grader.", do=do)
    asked, _ = prompt(record)
    name, reference = str(record.get("id", "")), record.get("reference") or {}
    task = Task(name, asked, record["grader"], reference, record.get("origin") or {})
    check_task(task, f"task {name}")
    return task


class ModelReward:
    """The score of a reward model."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, micro_tokens: int):
        self._scorer = load_scorer(folder, device=best_device())
        self._tokenizer, self._micro_tokens = tokenizer, micro_tokens

    def __call__(self, records: Sequence[Record], outputs: Sequence[Output]) -> list[float | str]:
        """The score of each answer behind its prompt."""
        rows = [self._ids(record, output) for record, output in zip(records, outputs)]
        return list(score_sequences(self._scorer, rows, self._micro_tokens))

    def _ids(self, record: Record, output: Output) -> list[int]:
        if output.prompt_ids and output.written_ids:
            return output.prompt_ids + output.written_ids
        asked, tools = prompt(record)
        reply = {"role": "assistant", "content": output.text}
        return list(encode_answer(self._tokenizer, asked, reply, tools)[0])


class _CallError(Exception):
    """A call gave no rewards; with fewer answers it may."""


class CalledReward:
    """A Python function, `module:function`, or an endpoint, called by a process of its own.

    The process is ended where a call takes longer than `seconds`, and started again when it is
    needed. Where a call fails, its answers are sent one by one.
    """

    def __init__(self, name: str, seconds: float):
        self._name, self._seconds = name, seconds
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, records: Sequence[Record], outputs: Sequence[Output]) -> list[float | str]:
        """The rewards of the answers' texts."""
        texts, rewards = [output.text for output in outputs], list[float | str]()
        for start in range(0, len(texts), _CALL):
            part = slice(start, start + _CALL)
            rewards += self._some(records[part], texts[part])
        return rewards

    def _some(self, records: Sequence[Record], texts: Sequence[str]) -> list[float | str]:
        try:
            values = self._call(records, texts)
            if len(values) != len(texts):
                raise _CallError(f"it returned {len(values)} rewards, not {len(texts)}")
        except _CallError as error:
            if len(texts) == 1:
                return [str(error)]
            pairs = zip(records, texts)
            return [reward for record, text in pairs for reward in self._some([record], [text])]
        return ["it returned no number" if value is None else value for value in values]

    def _call(self, records: Sequence[Record], texts: Sequence[str]) -> list[float | None]:
        """The rewards of one call, by a process that is started where there is none."""
        if self._process is None:
            command = [sys.executable, "-m", "openqwen.train.reward_worker", self._name]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, **pipes, text=True, encoding="utf-8")
            try:
                self._reply([], [], _START)
            except _CallError as error:
                raise self._unusable(str(error)) from None
        return self._reply(records, texts, self._seconds)

    def _reply(
        self, records: Sequence[Record], texts: Sequence[str], seconds: float
    ) -> list[float | None]:
        assert self._process is not None
        request = {"records": list(records), "answers": list(texts)}
        with ThreadPoolExecutor(1) as thread:
            line = json.dumps(request, default=str) + "\n"
            work = thread.submit(_exchange, self._process, line)
            try:
                reply = work.result(seconds)
            except FutureTimeout:
                self.close()  # the thread then reads the end of the pipe
                raise _CallError(f"it did not return within {seconds:g} seconds") from None
        if not reply:
            self.close()
            raise _CallError("its process ended")
        value = json.loads(reply)
        if "stop" in value:
            raise self._unusable(value["error"])
        if "error" in value:
            raise _CallError(value["error"])
        rewards: list[float | None] = value["rewards"]
        return rewards

    def _unusable(self, why: str) -> OpenQwenError:
        what = f"The reward {self._name} cannot be called: {why}."
        do = "name a function that can be imported here, or start the server; then run it again"
        return OpenQwenError(what, where="rewards.sources", do=do)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()


def _exchange(process: "subprocess.Popen[str]", line: str) -> str:
    """The reply to a line; empty where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()
    except (OSError, ValueError):
        return ""
