"""Exports: D and P, ranks with intervals, pairs with counts, models, and the raw events.

Each is a stream of records; no export holds the project in memory. `write_exports` makes files that
are whole or absent: an interrupted export leaves nothing behind.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection

from openqwen.http.json_body import dump_json
from openqwen.instruct.collaborate import bradley_terry
from openqwen.instruct.collaborate.database import Database
from openqwen.instruct.collaborate.events import read_events
from openqwen.instruct.collaborate.quality import quality
from openqwen.instruct.collaborate.results import PersonAnswer, TaskResult, results
from openqwen.instruct.collaborate.settings import ProjectConfig
from openqwen.support.files import whole_file
from openqwen.support.progress import progress

Record = dict[str, Any]
Exporter = Callable[[Connection, ProjectConfig], Iterator[Record]]
_BUFFER = 1 << 18  # bytes of a chunk


def export_events(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """Every event, in order."""
    for event in read_events(connection):
        yield vars(event)


def export_ranks(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """Each task's responses by Bradley-Terry, with 95% intervals, and every person's ranks."""
    for block in results(connection):
        for result, (order, scores, low, high) in zip(block, _ranked(block)):
            assert result.body is not None
            given = result.body["responses"]
            responses = [
                {
                    "index": n,
                    "score": scores[n],
                    "low": low[n],
                    "high": high[n],
                    "text": given[n]["text"],
                    "model": given[n]["origin"].get("model"),
                }
                for n in order
            ]
            yield {
                "id": result.id,
                "version": result.row.version,
                "prompt": result.body["prompt"],
                "responses": responses,
                "gold": result.gold,
                "answers": [_ranking(answer) for answer in result.answers],
            }


def _ranking(answer: PersonAnswer) -> Record:
    about: Record = {"person": answer.person, "name": answer.name, "kind": answer.kind}
    about |= {"seconds": answer.seconds, "order": answer.order, "seq": answer.seq}
    return about | answer.answer


def export_pairs(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """Every two responses that people compared: counts, margin, and the strengths' difference."""
    for block in results(connection):
        fitted = _fit(block)
        for result, (strengths, row) in zip(block, fitted):
            assert result.body is not None
            texts = [response["text"] for response in result.body["responses"]]
            for (a, b), (wins, losses, ties) in _votes(result).items():
                spread = strengths.covariance[row]
                error = float(np.sqrt(spread[a, a] + spread[b, b] - 2 * spread[a, b]))
                difference = float(strengths.scores[row, a] - strengths.scores[row, b])
                yield {
                    "id": result.id,
                    "prompt": result.body["prompt"],
                    "a": a,
                    "b": b,
                    "text_a": texts[a],
                    "text_b": texts[b],
                    "a_wins": wins,
                    "b_wins": losses,
                    "ties": ties,
                    "count": wins + losses + ties,
                    "margin": (wins - losses) / (wins + losses + ties),
                    "difference": round(difference, 6),
                    "low": round(difference - 1.959964 * error, 6),
                    "high": round(difference + 1.959964 * error, 6),
                }


def export_preferences(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """P: the pairs that more people order one way than the other. Gold tasks are left out."""
    for block in results(connection):
        for result in block:
            if result.gold is not None:
                continue
            assert result.body is not None
            responses = result.body["responses"]
            common = _origin(project, result)
            for pair, (wins, losses, ties) in _votes(result).items():
                count = wins + losses + ties
                if wins == losses:
                    continue
                chosen, rejected = pair if wins > losses else reversed(pair)
                origin = common | {
                    "margin": abs(wins - losses) / count,
                    "count": count,
                    "wins": max(wins, losses),
                    "losses": min(wins, losses),
                    "ties": ties,
                    "chosen": responses[chosen]["origin"],
                    "rejected": responses[rejected]["origin"],
                }
                yield {
                    "prompt": result.body["prompt"],
                    "chosen": [_assistant(responses[chosen]["text"])],
                    "rejected": [_assistant(responses[rejected]["text"])],
                    "origin": origin,
                }


def export_demonstrations(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """D: what people wrote, or else the response that is best and good enough.

    A response is good enough if no answer says that none is good, it has the project's minimum mean
    scores and none of its barred flags, and no other shares the first place.
    """
    for block in results(connection):
        for result, (strengths, row) in zip(block, _fit(block)):
            if result.gold is not None:
                continue
            assert result.body is not None
            prompt, origin = result.body["prompt"], _origin(project, result)
            written = _written(result)
            for text, answer in written.items():
                source = answer.answer["demonstration"]["from"]
                about = {"edited": True, "person": answer.name, "from": source}
                if source is not None:
                    about["response"] = result.body["responses"][source]["origin"]
                yield {"messages": [*prompt, _assistant(text)], "origin": origin | about}
            best = None if written else _best(result, strengths.scores[row], project)
            if best is not None:
                response = result.body["responses"][best]
                about = {"edited": False, "from": best, "response": response["origin"]}
                messages = [*prompt, _assistant(response["text"])]
                yield {"messages": messages, "origin": origin | about}


def export_models(connection: Connection, project: ProjectConfig) -> Iterator[Record]:
    """The models by Bradley-Terry over all tasks, with bootstrap intervals."""
    yield from quality(connection, project)["models"]


EXPORTS: dict[str, Exporter] = {
    "demonstrations": export_demonstrations,
    "preferences": export_preferences,
    "ranks": export_ranks,
    "pairs": export_pairs,
    "models": export_models,
    "events": export_events,
}


def export_bytes(database: Database, project: ProjectConfig, name: str) -> Iterator[bytes]:
    """An export as JSON Lines, in chunks, from one state of the database."""
    with database.read() as connection:
        lines: list[bytes] = []
        size = 0
        for record in EXPORTS[name](connection, project):
            lines.append(dump_json(record) + b"\n")
            size += len(lines[-1])
            if size > _BUFFER:
                yield b"".join(lines)
                lines, size = [], 0
        yield b"".join(lines)


def write_exports(database: Database, project: ProjectConfig, folder: Path) -> dict[str, int]:
    """Write every export into a folder, each file whole or not at all; returns their records."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in EXPORTS:
        counts[name] = 0
        with (
            progress(name, None, "records") as bar,
            whole_file(folder / f"{name}.jsonl", "wb") as file,
        ):
            for chunk in export_bytes(database, project, name):
                file.write(chunk)
                counts[name] += chunk.count(b"\n")
                bar.advance(chunk.count(b"\n"))
    return counts


def _votes(result: TaskResult) -> dict[tuple[int, int], tuple[int, int, int]]:
    """For each pair (a, b) that people compared: how many prefer a, prefer b, see a tie."""
    votes: dict[tuple[int, int], list[int]] = {}
    for answer in result.answers:
        if answer.kind == "model":
            continue
        for pair, value in answer.pairs.items():
            votes.setdefault(pair, []).append(value)
    return {
        pair: (values.count(1), values.count(-1), values.count(0))
        for pair, values in sorted(votes.items())
    }


def _fit(block: list[TaskResult]) -> list[tuple[bradley_terry.Strengths, int]]:
    """Strengths of each task's responses: (those of a group, its row); groups by size."""
    sizes = sorted({result.count for result in block})
    fitted: dict[int, tuple[bradley_terry.Strengths, int]] = {}
    for size in sizes:
        members = [n for n, result in enumerate(block) if result.count == size]
        wins = np.zeros((len(members), size, size))
        for row, n in enumerate(members):
            for (a, b), (won, lost, tied) in _votes(block[n]).items():
                wins[row, a, b] = won + tied / 2
                wins[row, b, a] = lost + tied / 2
        strengths = bradley_terry.fit(wins)
        fitted |= {n: (strengths, row) for row, n in enumerate(members)}
    return [fitted[n] for n in range(len(block))]


def _ranked(block: list[TaskResult]) -> Iterator[tuple[list[Any], ...]]:
    """Of each task: its responses in order, their strengths, and the bounds of these."""
    tables: dict[int, tuple[list[Any], ...]] = {}
    for strengths, row in _fit(block):
        if id(strengths) not in tables:  # all tasks of one size at once: NumPy's calls cost more
            order = np.argsort(-strengths.scores, kind="stable").tolist()
            values = (strengths.scores, strengths.low, strengths.high)
            tables[id(strengths)] = (order, *(np.round(one, 6).tolist() for one in values))
        yield tuple(table[row] for table in tables[id(strengths)])


def _written(result: TaskResult) -> dict[str, PersonAnswer]:
    """The demonstrations that people wrote: each text, and who wrote it first."""
    found: dict[str, PersonAnswer] = {}
    for answer in result.answers:
        demonstration = answer.answer["demonstration"]
        if answer.kind != "model" and demonstration and demonstration["text"].strip():
            found.setdefault(demonstration["text"], answer)
    return found


def _best(result: TaskResult, scores: np.ndarray, project: ProjectConfig) -> int | None:
    people = [answer.answer for answer in result.answers if answer.kind != "model"]
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    if not people or len(best) > 1 or any(answer["none_good"] for answer in people):
        return None
    key = str(best[0])
    for criterion, least in project.minimum.items():
        given = [
            answer["scores"][key][criterion]
            for answer in people
            if criterion in answer["scores"].get(key, {})
        ]
        if not given or sum(given) / len(given) < least:
            return None
    flags = {flag for answer in people for flag in answer["flags"].get(key, [])}
    return None if flags & set(project.barred) else int(best[0])


def _origin(project: ProjectConfig, result: TaskResult) -> Record:
    """How a record came to be: by people, from this task of this project."""
    assert result.body is not None
    people = sum(answer.kind != "model" for answer in result.answers)
    about: Record = {"method": "annotation", "project": project.id, "task": result.id}
    about |= {"version": result.row.version, "annotators": people}
    instruction = result.body["origin"]
    return about | {"parents": instruction.get("parents", []), "instruction": instruction}


def _assistant(text: str) -> Record:
    return {"role": "assistant", "content": text}
