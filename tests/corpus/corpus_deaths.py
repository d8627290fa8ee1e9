"""Workers of the corpus stage that die or stop in the middle. Worker processes import this file."""

import os
import time
from pathlib import Path

from openqwen.corpus import work


def dying(step: str, place: Path, *arguments):
    """A step whose worker is killed at its second part, once: documents written, not accounted."""
    return _at_second_part(step, place / f"{step}.died", lambda: os.kill(os.getpid(), 9), arguments)


def stuck(step: str, place: Path, *arguments):
    """A step that stops there for ever, once."""
    return _at_second_part(step, place / f"{step}.stuck", lambda: time.sleep(600), arguments)


def _at_second_part(step, mark, end, arguments):
    function, write = getattr(work, step)(*arguments), work.write_documents_jsonl

    def written(path, documents):
        write(path, documents)
        if path.name.startswith("00000001") and step in work_of[path.parent.name]:
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return
            end()

    work_of = {"raw": ["reading"], "mapped": ["mapping"], "final": ["applying"]}
    work.write_documents_jsonl = written
    return function
