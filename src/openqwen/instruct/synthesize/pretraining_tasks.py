"""The multi-task instruction data that Qwen2 mixes into pre-training, as plain text (report,
section 3.1).

A document holds several solved tasks in one of a few plain formats. No chat format and no held-out
prompt is in it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from openqwen.instruct.synthesize.kinds import number
from openqwen.instruct.synthesize.repurpose import demonstrations_from_docstrings
from openqwen.instruct.synthesize.tasks import stream_tasks
from openqwen.support.generators import Generators

# The first is the one that rejection sampling from the pre-trained model uses.
# An answer begins its line, as in a chat: behind a space its first word would be another token.
FORMATS = (
    "Question: {question}\nAnswer:\n{answer}",
    "Q: {question}\nA:\n{answer}",
    "Task: {question}\nResult:\n{answer}",
    "User: {question}\nAssistant:\n{answer}",
    "# {question}\n{answer}",
)
_DOCSTRING_SHARE = 0.15  # of the items, where there are documents to draw docstrings from
_ITEMS = (4, 10)  # solved tasks a document


def task_documents(
    seed: int, count: int, documents: Iterable[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """`count` documents of source "tasks": solved train-split tasks, and questions about the
    docstrings of `documents`.

    documents: training documents only. Each docstring is used once; the same seed gives the same
    text.
    """
    generators = Generators(seed)
    rng = generators["task-documents"]
    tasks = stream_tasks(generators["tasks"])
    docstrings = demonstrations_from_docstrings(documents, generators["docstrings"], seed)
    for index in range(count):
        form = FORMATS[int(rng.integers(len(FORMATS)))]
        items, names, parents = [], [], []
        for _ in range(number(rng, *_ITEMS)):
            described = next(docstrings, None) if rng.random() < _DOCSTRING_SHARE else None
            if described is None:
                task = next(tasks)
                question, answer, name = task.question, task.answer, task.task
            else:
                question, answer = (message["content"] for message in described["messages"])
                name = "docstring"
                parents += described["origin"]["parents"]
            items.append(form.format(question=question, answer=answer))
            names.append(name)
        yield {
            "id": f"tasks/{seed}/{index:06d}",
            "text": "\n\n".join(items) + "\n",
            "source": "tasks",
            "language": "en",
            "meta": {"tasks": names, "parents": parents},
        }
