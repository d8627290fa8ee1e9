"""Small tasks that a program makes and checks: 17 kinds on numbers, words and formats."""

from openqwen.tasks.checkable.closing import PRINCIPLE, stands_alone, with_closing
from openqwen.tasks.checkable.generate import (
    KINDS,
    SPLITS,
    draw_task,
    generate_tasks,
    split_of,
    stream_tasks,
)

__all__ = [
    "KINDS",
    "PRINCIPLE",
    "SPLITS",
    "draw_task",
    "generate_tasks",
    "split_of",
    "stands_alone",
    "stream_tasks",
    "with_closing",
]
