"""A pool of real instructions: HH prompts, GSM8K's training questions, questions from books.

    python benchmarks/instructions/pool.py pool.jsonl [--harmless 1100] [--gsm8k 950] [--books made]

Needs the files of OPENQWEN_SHARED_DATA. `made` is an artifact of `openqwen synthesize repurpose`
(steps.sh makes one from passages of books): its instructions are added, 400 of them by default.
Instructions come in turn from each source, so that the first n are a mixture too.
"""

import argparse
import gzip
import json
import os
import random
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from openqwen.support.files import write_jsonl

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("OPENQWEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
LONGEST = 1_000  # characters


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, packed or not."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def harmless() -> list[str]:
    """The first turns of the dialogues of HH."""
    found = []
    for record in records(DATA / "post/hh_harmless_base_test.jsonl.gz"):
        found.append(record["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip())
    return found


def gsm8k() -> list[str]:
    """The questions of GSM8K's training split."""
    return [record["question"].strip() for record in records(DATA / "eval/gsm8k_train.jsonl.gz")]


def books(made: Path) -> list[str]:
    """The instructions that a model wrote for passages of books."""
    return [record["messages"][0]["content"] for record in records(made / "demonstrations.jsonl")]


def passages(folder: Path, count: int) -> None:
    """Write documents of a few thousand characters from many books, for `repurpose`."""
    written: list[dict[str, Any]] = []
    for book in records(DATA / "corpus/books_en_train_1.jsonl.gz"):
        for part in range(-(-count // 150)):
            start = 20_000 + 40_000 * part  # behind title pages and lists of contents
            text = book["text"][start : start + 3_000]
            if len(text) == 3_000 and len(written) < count:
                written.append({"id": f"{book['id']}/{part}", "text": text})
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "books.jsonl", written)


def main() -> None:
    """Write the pool, or the passages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--harmless", type=int, default=1_100)
    parser.add_argument("--gsm8k", type=int, default=950)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--from-books", type=int, default=400)
    parser.add_argument(
        "--passages", type=int, help="write so many passages into the folder output"
    )
    asked = parser.parse_args()
    if asked.passages:
        passages(asked.output, asked.passages)
        return
    parts = [("hh", harmless(), asked.harmless), ("gsm8k", gsm8k(), asked.gsm8k)]
    if asked.books:
        parts.append(("books", books(asked.books), asked.from_books))
    sources = []
    for name, texts, count in parts:
        texts = [text for text in dict.fromkeys(texts) if 0 < len(text) <= LONGEST]
        random.Random(0).shuffle(texts)
        sources.append([(name, text) for text in texts[:count]])
    found = [one for row in zip_longest(*sources) for one in row if one]
    lines = []
    for n, (name, text) in enumerate(found):
        line = {"id": f"{name}-{n}", "prompt": [{"role": "user", "content": text}]}
        lines.append(line | {"origin": {"method": "read", "source": name}})
    write_jsonl(asked.output, lines)
    print({name: len(some) for (name, _, _), some in zip(parts, sources)}, len(found))


if __name__ == "__main__":
    main()
