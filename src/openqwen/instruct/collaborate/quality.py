"""Progress and quality: agreement, gold tasks, time, bias by position; a person and a task."""

import math
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, select, text

from openqwen.instruct.collaborate import agreement, bradley_terry
from openqwen.instruct.collaborate.agreement import RatingTable
from openqwen.instruct.collaborate.answers import mean_ranks, preference
from openqwen.instruct.collaborate.database import Database
from openqwen.instruct.collaborate.events import loads
from openqwen.instruct.collaborate.results import PersonAnswer, TaskResult, results
from openqwen.instruct.collaborate.review import pair_agreement
from openqwen.instruct.collaborate.settings import ProjectConfig
from openqwen.instruct.collaborate.tables import contents, events, people, tasks, work

Json = dict[str, Any]
_OLDEST = 5.0  # seconds for which numbers are not computed again
_OUTLIER = 3.5  # robust z-score of the logarithm of seconds (Iglewicz and Hoaglin 1993)
_MOST_MODELS = 40
_WORST = 50  # tasks and pairs of people that are listed
_WHY = {
    "one_annotator": "Only one person has answered: agreement needs a second one.",
    "no_overlap": "No two people have answered the same task yet.",
    "no_variation": "All values are the same, so chance cannot be told from agreement.",
}


class QualityCache:
    """The numbers of a project, computed again when there are new events, but not all the time."""

    def __init__(self, database: Database, project: ProjectConfig):
        self._database, self._project = database, project
        self._lock = threading.Lock()
        self._kept: Json = {"seq": -1}
        self._next = 0.0

    def get(self) -> Json:
        """The numbers; they may be some seconds old."""
        with self._lock, self._database.read() as connection:
            seq = connection.execute(select(func.max(events.c.seq))).scalar() or 0
            begun = time.monotonic()
            if seq != self._kept["seq"] and begun >= self._next:
                self._kept = quality(connection, self._project) | {"seq": seq}
                took = time.monotonic() - begun
                self._next = time.monotonic() + max(_OLDEST, 5 * took)
            return self._kept


def quality(connection: Connection, project: ProjectConfig) -> Json:
    """All numbers of a project; see docs/guides/annotation.md for what each means."""
    found = [result for block in results(connection, bodies=False) for result in block]
    pairs = preferences(found)
    # Agreement of people; a judge's with them is in the kappas and in its own line.
    human = [replace(r, answers=[a for a in r.answers if a.kind != "model"]) for r in found]
    ranks = RatingTable.of(_ranks(human))
    ratings = RatingTable.of((task, unit, value) for task, unit, _, value in preferences(human))
    answers = [answer for result in human for answer in result.answers]
    annotators = len({answer.person for answer in answers})
    return {
        "progress": progress(connection),
        "alpha": _measured(ratings, annotators, lambda r, w: agreement.alpha(r, "nominal", w)),
        "alpha_ranks": _measured(ranks, annotators, _alpha_of_ranks, interval=False),
        "ac1": _measured(ratings, annotators, agreement.ac1),
        "criteria": {
            criterion.id: agreement.alpha(RatingTable.of(_scores(human, criterion.id)), "interval")
            for criterion in project.criteria
        },
        "kappa": _kappas(pairs, found),
        "people": _people(connection, found, pairs),
        "position": position_bias(answers),
        "seconds": _histogram([answer.seconds for answer in answers if answer.seconds > 0]),
        "tasks": _worst(found),
        "models": _models(connection, found),
    }


def progress(connection: Connection) -> Json:
    """How far a project is."""
    columns = (func.count(), func.sum(tasks.c.answers), func.sum(tasks.c.wanted))
    total, answers, wanted = connection.execute(select(*columns)).one()
    full = select(func.count()).where(tasks.c.answers >= tasks.c.wanted)
    skipped = select(func.count()).where(work.c.status == "skipped")
    day = func.substr(events.c.at, 1, 10).label("day")
    per_day = select(day, func.count()).join(work, work.c.seq == events.c.seq)
    # By the label: an expression with parameters is another one at each place to PostgreSQL.
    per_day = per_day.where(work.c.status == "answered").group_by(text("day"))
    return {
        "tasks": total,
        "answers": int(answers or 0),
        "wanted": int(wanted or 0),
        "complete": connection.execute(full).scalar(),
        "skipped": connection.execute(skipped).scalar(),
        "days": [
            {"day": day, "answers": count}
            for day, count in connection.execute(per_day.order_by(text("day")))
        ],
    }


def preferences(found: Iterable[TaskResult]) -> list[tuple[int, int, str, int]]:
    """(task, unit, person, preference): each pair of responses is a unit."""
    pairs, unit = [], 0
    for number, result in enumerate(found):
        units: dict[tuple[int, int], int] = {}
        for answer in result.answers:
            for pair, value in answer.pairs.items():
                if pair not in units:
                    units[pair] = unit
                    unit += 1
                pairs.append((number, units[pair], answer.person, value))
    return pairs


def _ranks(found: Iterable[TaskResult]) -> Iterable[tuple[int, int, float]]:
    """(task, unit, rank): each response is a unit."""
    unit = 0
    for number, result in enumerate(found):
        for answer in result.answers:
            for response, rank in enumerate(mean_ranks(answer.ranks, result.count)):
                yield number, unit + response, rank
        unit += result.count


def _scores(found: Iterable[TaskResult], criterion: str) -> Iterable[tuple[int, int, float]]:
    unit = 0
    for number, result in enumerate(found):
        for answer in result.answers:
            for response, scores in answer.answer["scores"].items():
                if criterion in scores:
                    yield number, unit + int(response), scores[criterion]
        unit += result.count


def _alpha_of_ranks(ratings: RatingTable, weights: np.ndarray | None) -> float | None:
    return agreement.alpha(ratings, "ordinal", weights)


def _measured(
    ratings: RatingTable, annotators: int, measure: agreement.Measure, interval: bool = True
) -> Json:
    """A measure of agreement with its interval, or why it has no value."""
    value = measure(ratings, None) if len(ratings.counts) else None
    code = None
    if annotators < 2:
        value, code = None, "one_annotator"
    elif not ratings.overlapping:
        value, code = None, "no_overlap"
    elif value is None:
        code = "no_variation"
    bounds = agreement.interval(ratings, measure) if interval and value is not None else None
    low, high = bounds or (None, None)
    why = _WHY[code] if code else None
    return {"value": value, "low": low, "high": high, "why": why, "why_code": code}


def _kappas(pairs: Sequence[tuple[int, int, str, int]], found: Sequence[TaskResult]) -> list[Json]:
    """Cohen's kappa of each two people, those with most shared pairs first."""
    names = {answer.person: answer.name for result in found for answer in result.answers}
    units: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    for task, unit, person, value in pairs:
        units[unit][person] = (task, value)
    shared: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    for given in units.values():
        for a, b in combinations(sorted(given), 2):
            shared[a, b].append((given[a][0], given[a][1], given[b][1]))
    most = sorted(shared.items(), key=lambda item: -len(item[1]))[:_WORST]
    return [
        {
            "a": names[a],
            "b": names[b],
            "value": agreement.kappa([v for _, v, _ in values], [v for _, _, v in values]),
            "pairs": len(values),
            "tasks": len({task for task, _, _ in values}),
        }
        for (a, b), values in most
    ]


def _people(
    connection: Connection,
    found: Sequence[TaskResult],
    pairs: Sequence[tuple[int, int, str, int]],
) -> list[Json]:
    answers: dict[str, list[PersonAnswer]] = defaultdict(list)
    gold: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for result in found:
        for answer in result.answers:
            answers[answer.person].append(answer)
            if result.gold is not None:
                right, of = gold_pairs(answer.pairs, result.gold, result.count)
                gold[answer.person][0] += right
                gold[answer.person][1] += of
    same = _agreement_of_people(pairs)
    logs = [math.log(a.seconds) for given in answers.values() for a in given if a.seconds > 0]
    chosen = select(work.c.person, func.count()).where(work.c.status == "skipped")
    skips: dict[str, int] = dict(connection.execute(chosen.group_by(work.c.person)).tuples().all())
    last = select(work.c.person, func.max(work.c.seq).label("seq")).group_by(work.c.person)
    latest = last.subquery()
    when = select(latest.c.person, events.c.at).join(events, events.c.seq == latest.c.seq)
    times = dict(connection.execute(when).tuples().all())
    rows = connection.execute(select(people).order_by(people.c.since, people.c.name)).all()
    return [
        {
            "id": row.id,
            "name": row.name,
            "role": row.role,
            "kind": row.kind,
            "active": row.active,
            "answers": len(answers[row.id]),
            "skipped": skips.get(row.id, 0),
            "gold": {"right": gold[row.id][0], "of": gold[row.id][1]},
            "seconds": _times([a.seconds for a in answers[row.id]], logs),
            "agreement": same.get(row.id),
            "position": position_bias(answers[row.id]),
            "last": times.get(row.id),
        }
        for row in rows
    ]


def gold_pairs(
    given: Mapping[tuple[int, int], int], gold: Sequence[Sequence[int]], count: int
) -> tuple[int, int]:
    """(pairs ordered as the known ranks order them, pairs that those order)."""
    known = {pair: value for pair, value in preference(gold, count).items() if value}
    return sum(given.get(pair) == value for pair, value in known.items()), len(known)


def _agreement_of_people(pairs: Sequence[tuple[int, int, str, int]]) -> dict[str, float]:
    """For each person, the share of others' values that are the person's own."""
    units: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for _, unit, person, value in pairs:
        units[unit].append((person, value))
    same: Counter[str] = Counter()
    both: Counter[str] = Counter()
    for given in units.values():
        values = Counter(value for _, value in given)
        for person, value in given:
            same[person] += values[value] - 1
            both[person] += len(given) - 1
    return {person: same[person] / count for person, count in both.items() if count}


def _times(seconds: Sequence[float], logs: Sequence[float]) -> Json:
    """The median of a person's seconds, and how many are outliers among everybody's."""
    measured = [value for value in seconds if value > 0]
    if not measured:
        return {"median": None, "outliers": 0}
    middle = statistics.median(logs)
    spread = statistics.median(abs(value - middle) for value in logs) / 0.6745
    far = [v for v in measured if spread and abs(math.log(v) - middle) / spread > _OUTLIER]
    return {"median": statistics.median(measured), "outliers": len(far)}


def position_bias(answers: Sequence[PersonAnswer]) -> Json:
    """How often the response at each place on the screen was ranked best.

    A shared first rank counts for each of its places in part. p: of Pearson's chi-squared test that
    all places win equally often, over the answers with the most frequent number of responses.
    """
    sizes = Counter(len(answer.order) for answer in answers if answer.ranks)
    if not sizes:
        return {"shares": [], "expected": None, "p": None, "answers": 0}
    size = min(sizes, key=lambda size: (-sizes[size], size))
    wins = np.zeros(size)
    for answer in answers:
        if answer.ranks and len(answer.order) == size:
            best = answer.ranks[0]
            for number in best:
                wins[answer.order.index(number)] += 1 / len(best)
    total = sizes[size]
    expected = total / size
    p = _chi_squared_tail(float(((wins - expected) ** 2).sum() / expected), size - 1)
    shares = [float(share) for share in wins / total]
    return {"shares": shares, "expected": 1 / size, "p": p, "answers": total}


def _chi_squared_tail(value: float, freedom: int) -> float:
    """The chance that a chi-squared variable exceeds a value: Q(freedom / 2, value / 2)."""
    half = value / 2
    if freedom < 1 or half <= 0:
        return 1.0
    a = 0.5 if freedom % 2 else 1.0
    tail = math.erfc(math.sqrt(half)) if freedom % 2 else math.exp(-half)
    while a < freedom / 2:  # Q(a + 1, x) = Q(a, x) + x^a exp(-x) / Gamma(a + 1)
        tail += math.exp(a * math.log(half) - half - math.lgamma(a + 1))
        a += 1
    return min(tail, 1.0)


def _histogram(seconds: Sequence[float]) -> Json:
    if not seconds:
        return {"edges": [], "counts": []}
    logs = np.log10(np.maximum(seconds, 0.1))
    counts, edges = np.histogram(logs, bins=min(20, max(5, len(seconds) // 5)))
    return {"edges": [float(edge) for edge in 10**edges], "counts": counts.tolist()}


def _worst(found: Sequence[TaskResult]) -> list[Json]:
    """The tasks on which people agree least."""
    listed = []
    for result in found:
        share = pair_agreement(answer.pairs for answer in result.answers)
        if share is not None:
            about = {"id": result.id, "preview": result.row.preview, "agreement": share}
            listed.append(about | {"answers": len(result.answers)})
    return sorted(listed, key=lambda task: task["agreement"])[:_WORST]


def _models(connection: Connection, found: Sequence[TaskResult]) -> list[Json]:
    """Bradley-Terry strengths of the models, over people's answers, with bootstrap intervals."""
    named = _models_of(connection, found)
    used = Counter(name for models in named for name in models if name is not None)
    names = [name for name, _ in used.most_common(_MOST_MODELS)]
    if len(names) < 2:
        return []
    index: dict[str | None, int] = {name: n for n, name in enumerate(names)}
    wins = np.zeros((len(found), len(names), len(names)))
    for number, (result, models) in enumerate(zip(found, named)):
        for answer in result.answers:
            if answer.kind == "model":
                continue
            for (a, b), value in answer.pairs.items():
                first, second = index.get(models[a]), index.get(models[b])
                if first is None or second is None or first == second:
                    continue
                wins[number, first, second] += (1 + value) / 2
                wins[number, second, first] += (1 - value) / 2
    total = wins.sum(0)
    scores = bradley_terry.fit(total, prior=0.01).scores
    low, high = bradley_terry.bootstrap(wins, prior=0.01)
    table = [
        {"model": name, "score": scores[n], "low": low[n], "high": high[n]}
        | {"wins": total[n].sum(), "losses": total[:, n].sum()}
        for n, name in enumerate(names)
    ]
    plain = [{k: v if k == "model" else float(v) for k, v in row.items()} for row in table]
    return sorted(plain, key=lambda row: -row["score"])


def _models_of(connection: Connection, found: Sequence[TaskResult]) -> list[list[str | None]]:
    """The model of each response of each task."""
    by_task: dict[str, list[str | None]] = {}
    present = (contents.c.task == tasks.c.id) & (contents.c.version == tasks.c.version)
    chosen = select(contents.c.task, contents.c.body).join(tasks, present)
    for row in connection.execute(chosen.where(tasks.c.answers > 0)).yield_per(1_000):
        body = loads(row.body)
        by_task[row.task] = [r["origin"].get("model") for r in body["responses"]]
    return [by_task[result.id] for result in found]
