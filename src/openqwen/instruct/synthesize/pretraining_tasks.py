"""The multi-task instruction data that Qwen2 mixes into pre-training, as plain text.

Qwen2 report, section 3.1. A document holds several solved tasks in one of a few plain formats. It
holds no chat format and no problem of the heldout and test splits.
"""

from collections.abc import Iterator
from typing import Any

from openqwen.support.generators import Generators
from openqwen.tasks.checkable import stream_tasks
from openqwen.tasks.plain import PLAIN_FORMATS

_FEWEST, _MOST = 4, 10  # solved tasks in a document


def task_documents(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` documents of solved tasks, with the source "tasks". The same seed gives the same."""
    generators = Generators(seed)
    rng = generators["task-documents"]
    tasks = stream_tasks(generators["tasks"])
    for index in range(count):
        form = PLAIN_FORMATS[int(rng.integers(len(PLAIN_FORMATS)))]
        items, kinds = [], []
        for _ in range(int(rng.integers(_FEWEST, _MOST + 1))):
            rng.random()  # nothing depends on it; without it a seed's documents would change
            task = next(tasks)
            items.append(form.format(question=task.question, answer=task.reference["answer"]))
            kinds.append(task.kind)
        yield {
            "id": f"tasks/{seed}/{index:06d}",
            "text": "\n\n".join(items) + "\n",
            "source": "tasks",
            "language": "en",
            "meta": {"tasks": kinds, "parents": []},
        }
