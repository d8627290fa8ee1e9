"""What programs of evidence share: raw text of this machine, stages, and plots with intervals."""

import html
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from openqwen.corpus.decontaminate import EvaluationIndex
from openqwen.corpus.read import FolderReader
from openqwen.instruct.synthesize.passages import passages
from openqwen.support.files import read_jsonl, whole_file
from openqwen.support.page.charts import ticks

HELDOUT = "heldout.jsonl"
_TEXT_ENDINGS = {".txt", ".md", ".rst", ".json", ".js", ".css", ".csv", ".html", ".xml", ".toml"}
_TEXT_NAMES = {"METADATA", "RECORD", "LICENSE", "COPYING", "NOTICE", "AUTHORS"}
_LONGEST = 1_000_000  # bytes of a file
_HELDOUT_BYTES = 300_000  # of each source
_HELDOUT_PIECE = 4_000  # characters of a document


def raw_text(folder: Path, books: Sequence[Path], megabytes: float, heldout: float = 0.1) -> None:
    """Write raw documents of three sources, and held-out text beside them; nothing is filtered.

    books: passages of English books; held out are those of a tenth of the authors. code: Python
    files of the standard library and of installed packages, with what is generated or twice there.
    packages: all other text of installed packages: licences, metadata, tables, minified scripts;
    held out are the descriptions (READMEs) of a tenth of the packages. The split is by hashes of
    names. What shares 13 words in a row with the raw documents is not held out: a corpus without
    deduplication would win by knowing it by heart.

    Args:
        folder: gets text/SOURCE/documents.jsonl and heldout.jsonl.
        books: files of records with author and text.
        megabytes: most text of a source.
    """
    if (folder / HELDOUT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"books": _books(books), "code": _files(True), "packages": _files(False)}
    held: list[dict] = []
    for source, found in sources.items():
        size, held_size = 0, 0
        path = folder / "text" / source / "documents.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            for group, name, text in found:
                if _draw(group) < heldout:
                    text = _written(name, text) if source == "packages" else text
                    if held_size < _HELDOUT_BYTES and len(text) >= 400:
                        text = text[:_HELDOUT_PIECE]  # of many, not of a few large
                        held_size += len(text)
                        held.append({"source": source, "id": name, "text": text})
                elif size < megabytes * 1e6:
                    size += len(text.encode("utf-8", "replace"))
                    file.write(json.dumps({"id": name, "text": text}) + "\n")
                if size >= megabytes * 1e6 and held_size >= _HELDOUT_BYTES:
                    break
    index = EvaluationIndex({str(number): one["text"] for number, one in enumerate(held)})
    known = index.shared_runs(one["text"] for one in FolderReader(folder / "text", 10**7))
    with whole_file(folder / HELDOUT) as out:
        for number, one in enumerate(held):
            if str(number) not in known:
                out.write(json.dumps(one) + "\n")


def _written(name: str, text: str) -> str:
    """What people wrote of a package: the description behind its metadata, or nothing."""
    return text.partition("\n\n")[2] if Path(name).name == "METADATA" else ""


def _draw(name: str) -> float:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "replace")) / 2**64


def _books(files: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """(author, name, text) of passages."""
    for path in files:
        for book in read_jsonl(path):
            found = passages(book["text"], 2_000, 8_000)
            for number in range(0, len(found), 4):  # of more books
                yield book["author"], f"{book['id']}/{number}", found[number]


def _files(code: bool) -> Iterator[tuple[str, str, str]]:
    """(package, name, text) of files of the standard library and of packages, in random order."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    found: dict[str, Path] = {}
    for root in [library, packages] if code else [packages]:
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            ending = path.suffix.lower()
            wanted = (
                ending == ".py" if code else ending in _TEXT_ENDINGS or path.stem in _TEXT_NAMES
            )
            if wanted and not {"site-packages", "__pycache__"} & set(Path(name).parts):
                found[name] = path
    for name in sorted(found, key=_draw):
        path = found[name]
        if path.is_file() and path.stat().st_size <= _LONGEST:
            text = path.read_bytes().decode("utf-8", "replace")
            if text.strip():
                yield Path(name).parts[0].partition("-")[0], name, text


def heldout_documents(folder: Path) -> list[dict]:
    """The held-out documents: {"source", "id", "text"}."""
    return list(read_jsonl(folder / HELDOUT))


def documents_in(folder: Path) -> int:
    """How many documents a folder of raw text has."""
    return sum(1 for _ in FolderReader(folder, 10**7))


def stage(*words: object) -> None:
    """Run `openqwen` on this machine; what is finished is not done again."""
    command = [sys.executable, "-m", "openqwen.cli", *map(str, words)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"it stopped at: {' '.join(command[2:])}\nthe same command continues it")


def interval_plot(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """An SVG of means with their intervals. rows: label, mean, and the interval's ends."""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    room = (high - low) * 0.08 or 1.0
    low, high = low - room, high + room

    def across(value: float) -> float:
        return 210 + 420 * (value - low) / (high - low)

    height = 60 + 22 * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="660" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for value in ticks(low, high, about=6):
        x = across(value)
        lines.append(f'<path d="M{x:.1f} 32V{height - 24}" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{value:g}</text>')
    for number, (label, mean, first, last) in enumerate(rows):
        y = 46 + 22 * number
        lines.append(f'<text x="200" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>')
        lines.append(
            f'<path d="M{across(first):.1f} {y}H{across(last):.1f}" stroke="#357" stroke-width="2"/>'
        )
        lines.append(f'<circle cx="{across(mean):.1f}" cy="{y}" r="4" fill="#357"/>')
    return "\n".join([*lines, "</svg>\n"])
