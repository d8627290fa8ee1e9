"""Scores by a reward model.

reference: {"threshold"?: the reward from which an answer passes, 0 if not given, "model"?: the name
of the model, "reward" if not given}. A grade's score is σ(reward), its `raw` the reward itself.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from openqwen.support.errors import OpenQwenError
from openqwen.tasks.judge import is_number
from openqwen.tasks.models import ConversationScorer, GraderModel, ask_each, by_model
from openqwen.tasks.task import Grade, Task


def judge(
    tasks: Sequence[Task], answers: Sequence[str], models: Sequence[GraderModel]
) -> list[Grade]:
    """Score each conversation with its answer; each model is asked once, with all of its own."""
    grades: dict[int, Grade] = {}
    for model, indices in by_model(models):
        conversations = [
            [*tasks[index].prompt, {"role": "assistant", "content": answers[index]}]
            for index in indices
        ]
        rewards = ask_each(partial(_score, model), conversations)
        for index, reward in zip(indices, rewards, strict=True):
            grades[index] = _grade(tasks[index].reference, reward)
    return [grades[index] for index in range(len(tasks))]


def _score(model: GraderModel, conversations: list[list[dict[str, Any]]]) -> list[float]:
    return cast(ConversationScorer, model.model).score(conversations)


def _grade(reference: dict[str, Any], reward: float | OpenQwenError) -> Grade:
    if isinstance(reward, OpenQwenError):
        return Grade(False, 0.0, f"the reward model failed: {reward.what}", "infra")
    if not math.isfinite(reward):
        return Grade(False, 0.0, f"the reward model gave {reward}", "infra")
    score = 1 / (1 + math.exp(-max(-700.0, min(700.0, reward))))
    passed = reward >= reference.get("threshold", 0)
    return Grade(passed, score, f"reward {reward:.4g}", raw=float(reward))


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    return "" if is_number(reference.get("threshold", 0)) else "'threshold' must be a number"
