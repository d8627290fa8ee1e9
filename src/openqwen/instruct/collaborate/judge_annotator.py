"""A model as one more annotator: it ranks the tasks of the queue, and its agreement is measured.

It sees what people see: the responses in an order drawn for it, and the guidelines. It takes no
place of a person, and exports leave its answers out of D and P.
"""

import random
import re
import time
from collections.abc import Sequence

from sqlalchemy import Connection, Row, select

from openqwen.engine import Endpoint, EngineConfig, Generator, Sampling
from openqwen.engine.workers import EngineSource
from openqwen.instruct.collaborate.accounts import add_person
from openqwen.instruct.collaborate.annotate import answer_event, content
from openqwen.instruct.collaborate.answers import SLOTS, AnswerBody, check_complete, stored
from openqwen.instruct.collaborate.database import Database
from openqwen.instruct.collaborate.events import LogEvent, loads, record
from openqwen.instruct.collaborate.queue import lease_next
from openqwen.instruct.collaborate.settings import ProjectConfig
from openqwen.instruct.collaborate.tables import people, work
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.support.progress import console, progress
from openqwen.support.settings import Quantization

_BATCH = 16  # tasks that are asked at once
_LONGEST = 1_024  # tokens of an answer
_ORDER = re.compile(r"(?<![A-Za-z])[A-Z](?:\s*[>=]\s*[A-Z])+(?![A-Za-z])")
_PROMPT = """\
Rank the responses to an instruction from best to worst.
{guidelines}
# Instruction

{instruction}

{responses}

First say in a few sentences how the responses differ. Then write one last line with all letters \
({slots}): ">" where the left one is better, "=" where two are equally good. \
Example of its form: {example}"""


def run_judge(
    database: Database,
    project: ProjectConfig,
    source: str,
    most: int,
    generator: Generator | None = None,
    quantize: Quantization | None = None,
) -> dict[str, int]:
    """Let a model answer tasks of the queue.

    Args:
        source: a folder, a .gguf file, a hub id, or URL#MODEL of a server with OpenAI's API.
        most: tasks that it answers in this run; an interrupted run goes on where it was.
        generator: the model, if it is loaded already.
        quantize: how its weights are stored where it is loaded here.

    Returns:
        How many tasks it "answered" and "skipped" (its answers had no order of all responses).
    """
    name, generator = _open(source, quantize, generator)
    counts = {"answered": 0, "skipped": 0}
    with progress("judge", most, "tasks") as bar:
        while (asked := counts["answered"] + counts["skipped"]) < most:
            with database.write() as connection:
                batch = _lease_batch(connection, project, name, min(_BATCH, most - asked))
                prompts = [judge_messages(connection, row, project) for row in batch]
            if not batch:
                break
            begun = time.monotonic()
            outputs = generator.generate(prompts, Sampling(_LONGEST))
            seconds = (time.monotonic() - begun) / len(batch)
            with database.write() as connection:
                for row, output in zip(batch, outputs):
                    done = _record(connection, row, output.text, seconds, project)
                    counts["answered" if done else "skipped"] += 1
            bar.advance(len(batch), **counts)
    console.print(f"{name}: {counts['answered']:,} ranked, {counts['skipped']:,} without an order")
    return counts


def ranks_of(text: str, slots: Sequence[str]) -> list[list[str]] | None:
    """The last order of all slots that a text names, such as "B > A = C"; None without one."""
    for found in reversed(_ORDER.findall(text)):
        tiers = [re.findall("[A-Z]", tier) for tier in found.split(">")]
        if sorted(slot for tier in tiers for slot in tier) == sorted(slots):
            return tiers
    return None


def judge_messages(
    connection: Connection, row: Row, project: ProjectConfig
) -> list[dict[str, str]]:
    """The messages that ask for a ranking of leased work."""
    body, order = content(connection, row.task, row.version), loads(row.order)
    turns = body["prompt"]
    asked = turns[0]["content"]
    if len(turns) > 1:
        asked = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    slots = SLOTS[: len(order)]
    texts = [
        f"# Response {slot}\n\n{body['responses'][number]['text']}"
        for slot, number in zip(slots, order)
    ]
    guidelines = f"\n{project.guidelines.strip()}\n" if project.guidelines.strip() else ""
    text = _PROMPT.format(
        guidelines=guidelines,
        instruction=asked,
        responses="\n\n".join(texts),
        slots=", ".join(slots),
        example=_example(slots, f"{project.seed}/{row.task}/{row.version}"),
    )
    return [{"role": "user", "content": text}]


def _example(slots: str, name: str) -> str:
    """An order of all slots, drawn for each task: a weak judge copies it, and favours no place."""
    drawn = random.Random(f"example/{name}").sample(slots, len(slots))
    return f"{' > '.join(drawn[:-1])} {'=' if len(drawn) > 2 else '>'} {drawn[-1]}"


def _open(
    source: str, quantize: Quantization | None, generator: Generator | None
) -> tuple[str, Generator]:
    """(the judge's name, its model)."""
    if generator is not None:
        return source, generator
    if "://" in source:
        url, _, name = source.partition("#")
        if not name:
            do = "give URL#MODEL, such as http://127.0.0.1:8000/v1#qwen"
            raise OpenQwenError("The judge's model is not named.", "--judge", do)
        return name, Endpoint(url, name)
    engine = EngineSource(local(source), quantize, EngineConfig(max_running=_BATCH)).load()
    return source.rstrip("/").rpartition("/")[2], engine


def _lease_batch(
    connection: Connection, project: ProjectConfig, name: str, count: int
) -> list[Row]:
    """Work for a judge: what an interrupted run has left open, then new tasks."""
    title = f"{name[:50]} (judge)"
    chosen = select(people).where(people.c.name == title)
    if connection.execute(chosen).first() is None:
        add_person(connection, title, "annotator", "model")
    judge = connection.execute(chosen).one()
    mine = select(work).where(work.c.person == judge.id, work.c.status == "open")
    batch = list(connection.execute(mine.order_by(work.c.opened).limit(count)).all())
    while len(batch) < count:
        row = lease_next(connection, judge, project, time.time())
        if row is None:
            break
        batch.append(row)
    return batch


def _record(
    connection: Connection, row: Row, text: str, seconds: float, project: ProjectConfig
) -> bool:
    """Record the ranking in a model's answer; False where it has none."""
    order = loads(row.order)
    ranks = ranks_of(text, SLOTS[: len(order)])
    if ranks is None:
        new = {"reason": "no order of all responses", "answer": text[:10_000]}
        record(
            connection,
            LogEvent("skipped", row.person, row.task, row.version, order, None, new, seconds),
        )
        return False
    # A judge may see ties that people may not, and writes no demonstration.
    lenient = project.model_copy(update={"ties": True, "demonstrations": "optional"})
    body = AnswerBody(ranks=ranks, comment=text[:10_000])
    answer = check_complete(stored(body, order, lenient), len(order), lenient)
    answer_event(connection, row, answer, seconds, None)
    return True
