"""Judges of answers: an engine, an endpoint or a reward model; pairs are judged in both orders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from openqwen.engine import Endpoint, Engine, Generator, Output, Prompt, Sampling
from openqwen.engine.score import RewardModel
from openqwen.model import load_model
from openqwen.model.stored import stored_in_folder
from openqwen.support.device import best_device
from openqwen.support.hub import local
from openqwen.support.progress import Progress
from openqwen.tasks import ConversationScorer, Grade, GradeCache, GraderModel, Task, grade
from openqwen.tokenizer import load_tokenizer

_SAMPLING = Sampling(max_tokens=2048)  # FastChat's limit for a judge
_PLACES = ("A", "B")


class LazyGenerator(Generator):
    """A generator that is loaded when it is first asked: known grades need none."""

    def __init__(self, load: Callable[[], Generator]):
        self._load = load

    @cached_property
    def loaded(self) -> Generator:
        """The generator."""
        return self._load()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _SAMPLING,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt; see `Generator.generate`."""
        return self.loaded.generate(prompts, sampling, seeds, progress)


class LazyScorer(ConversationScorer):
    """A reward model that is loaded when it is first asked."""

    def __init__(self, load: Callable[[], ConversationScorer]):
        self._load = load

    @cached_property
    def loaded(self) -> ConversationScorer:
        """The reward model."""
        return self._load()

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """Score each conversation; see `ConversationScorer.score`."""
        return self.loaded.score(conversations)


def load_judge(
    source: str, served_name: str | None, cache: Path, digest: Callable[[Path], str]
) -> dict[str, GraderModel]:
    """The judge under the name that graders know: "judge", or "reward" for a reward model.

    Args:
        source: the URL of a server with OpenAI's API, a folder, a .gguf file or a hub id.
        served_name: the model's name at the server.
        cache: a folder for a server's responses.
        digest: of the files of a model.
    """
    if source.startswith(("http://", "https://")):
        name = served_name or "judge"
        server = Endpoint(source, name, cache=cache / "judge")
        return {"judge": GraderModel(server, f"{source} {name}", _SAMPLING)}
    path = local(source)
    identity = digest(path)
    if path.is_dir() and "score.weight" in stored_in_folder(path):
        scorer = LazyScorer(lambda: RewardModel.load(path))
        return {"reward": GraderModel(scorer, identity)}

    def load() -> Engine:
        return Engine(load_model(path, device=best_device()), load_tokenizer(path))

    return {"judge": GraderModel(LazyGenerator(load), identity, _SAMPLING)}


def grade_answers(
    tasks: Sequence[Task],
    answers: Sequence[str],
    judges: Mapping[str, GraderModel],
    cache: GradeCache | None = None,
    progress: Progress | None = None,
) -> list[tuple[Grade, list[int]]]:
    """Grade answers, those of pairs in both orders; a reward model may stand in for a judge.

    Returns:
        For each answer its grade, and the strengths (−2 to 2) of a pair's verdicts. A pair's score
        is the mean of them; where one verdict is missing the status is "infra".
    """
    rewarded = "reward" in judges and "judge" not in judges
    asked: list[Task] = []
    texts: list[str] = []
    parts: list[int] = []
    for task, answer in zip(tasks, answers, strict=True):
        new = _questions(task, answer, rewarded)
        asked += [question for question, _ in new]
        texts += [text for _, text in new]
        parts.append(len(new))
    if progress is not None:
        progress.total = len(asked)
    grades = iter(grade(asked, texts, models=judges, cache=cache, progress=progress))
    found = []
    for task, count in zip(tasks, parts):
        own = [next(grades) for _ in range(count)]
        found.append(_pair(own, rewarded) if task.grader == "pairwise" else (own[0], list[int]()))
    return found


def _questions(task: Task, answer: str, rewarded: bool) -> list[tuple[Task, str]]:
    """What graders are asked about one answer: (task, text) each."""
    if rewarded and task.grader in ("judge", "pairwise"):
        texts = [answer] if task.grader == "judge" else [answer, task.reference["other"]]
        return [(replace(task, grader="reward", reference={}), text) for text in texts]
    if task.grader != "pairwise":
        return [(task, answer)]
    return [
        (replace(task, reference=task.reference | {"place": place}), answer) for place in _PLACES
    ]


def _pair(grades: Sequence[Grade], rewarded: bool) -> tuple[Grade, list[int]]:
    for one in grades:
        if not one.counts:
            return one, []
    raws = [one.raw or 0.0 for one in grades]
    games = [int(raw) for raw in raws]
    if rewarded:
        games = [(raws[0] > raws[1]) - (raws[0] < raws[1])]
    scores = [(1 + (strength > 0) - (strength < 0)) / 2 for strength in games]
    score = sum(scores) / len(scores)
    return Grade(score > 0.5, score, "; ".join(one.reason for one in grades)), games
