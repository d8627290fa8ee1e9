"""Decisions and speed of the published filters against datatrove's, on the same documents.

datatrove has its own environment, since its pins differ from ours:

    python3 -m venv peers/datatrove
    peers/datatrove/bin/pip install datatrove==0.10.1 spacy nltk regex tldextract tokenizers "xxhash<4"
    python benchmarks/filters_datatrove.py --datatrove peers/datatrove/bin/python --text FILE.jsonl.gz...

Texts are cut into documents of about 3,000 characters; web-like pages that fail one rule each are
added. --golden FILE writes those pages with datatrove's decisions, for the test. Rates are of
processor time of one thread; documents that were read before are not read again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PRESETS = ("gopher", "c4", "fineweb")
# Run by datatrove's Python: documents in, one line of decisions for each out.
THEIRS = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter)
chains = {
    "gopher": [GopherRepetitionFilter(), GopherQualityFilter()],
    "c4": [C4QualityFilter()],
    "fineweb": [GopherRepetitionFilter(), GopherQualityFilter(),
                C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()],
}
chains["gopher"][1].filter(Document(text="one two", id="warm"))
seconds = dict.fromkeys(chains, 0.0)
for line in open(sys.argv[1], encoding="utf-8"):
    answer = {}
    for name, chain in chains.items():
        document = Document(text=json.loads(line), id="x")
        start = time.process_time()
        for step in chain:
            result = step.filter(document)
            if result is not True and result[0] is not True:
                answer[name] = [False, result[1], ""]
                break
        else:
            answer[name] = [True, "", document.text]
        seconds[name] += time.process_time() - start
    print(json.dumps(answer))
print(json.dumps(seconds))
"""


def pieces(paths: list[Path], most: int, step: int = 9_000) -> Iterator[str]:
    """Documents of about 3,000 characters that end at a line's end, spread over the files.

    step: characters from the start of one to the next in a text.
    """
    from openqwen.support.records import read_records

    for path in paths:
        left = most // len(paths)
        for _, record in read_records(path):
            text = next((v for k, v in record.items() if k in ("text", "answer", "chosen")), "")
            for start in range(0, len(text), step):
                piece = text[start : start + 3_000].rpartition("\n")[0].strip("\n")
                if piece.strip() and left:
                    yield piece
                    left -= 1


def made_pages(seed: int = 0) -> list[str]:
    """Pages as the web has them: some good, each other one with one thing wrong."""
    draw = random.Random(seed)
    common = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "a",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "with",
        "as",
        "be",
        "have",
        "this",
        "from",
        "by",
        "but",
        "not",
    ]
    rare = [
        f"{a}{b}"
        for a in ["harb", "lett", "mark", "wint", "garr", "stor", "ple", "mond"]
        for b in ["our", "er", "et", "ing", "on", "y", "ed", "ure", "ish", "ow"]
    ]
    odd = ["didn't", "well-known", "Mr. Hill's", "9 a.m.", "U.S.", "3.5%", "(twice)", "e.g.", "£4"]

    def sentence() -> str:
        kinds = draw.choices((common, rare, odd), (10, 10, 1), k=draw.randrange(6, 16))
        line = " ".join(draw.choice(kind) for kind in kinds)
        return f"{line[0].upper()}{line[1:]}{draw.choice(('.', '.', '!', '?', '.”'))}"

    def prose(lines: int = 6) -> list[str]:
        return [" ".join(sentence() for _ in range(2)) for _ in range(lines)]

    def with_share(share: float, bad: str) -> list[str]:
        return [bad if draw.random() < share else line for line in prose(16)]

    pages = [prose() for _ in range(4)]
    for share in (0.1, 0.25, 0.35, 0.7):
        for bad in ("Read more", "The same line of eight words stands here.", "so it goes on..."):
            pages.append(with_share(share, bad))
        pages.append(
            [f"- item {i}" if draw.random() < share + 0.25 else x for i, x in enumerate(prose())]
        )
        pages.append(
            [
                x if draw.random() > share else f"{i} 17:30 £4.20 12/7 88"
                for i, x in enumerate(prose())
            ]
        )
        pages.append([x if draw.random() > share else "# ... … # #tag" for x in prose()])
        pages.append([f"{x}\n\n{x}" if draw.random() < share else x for x in prose()])
    pages += [
        prose(2)[:1],
        ["word " * 20],
        prose(900),
        ["a b c d e " * 30],
        ["incomprehensibilities " * 60],
    ]
    pages += [
        [*prose(), x]
        for x in ("Lorem ipsum dolor sit.", "if (x) { return; }", "Enable JavaScript now.")
    ]
    pages += [[*prose(), "We use cookies on this site. See the privacy policy [1] here [edit]."]]
    pages += [[x.replace("the", "teh").replace("of", "fo").replace("a ", "ein ") for x in prose()]]
    pages += [[x.rstrip(".!)") for x in prose()], [y for x in prose(6) for y in x.split()]]
    pages += [
        ["to be or not to be, " * 40 + "that is it."],
        ["x" * 1200 + " is a long word.", *prose()],
    ]
    pages += [[f"Menu {i}" for i in range(40)] + prose(3), prose(3) + ["Home | About | © 2024"] * 6]
    pages += [
        [" ".join(x.split()[:4]) for x in prose(40)],
        [" ".join(x.upper().split()) for x in prose()],
    ]
    pages += [
        [f"  {x}  \t" for x in prose()],
        [x.replace(" ", "  ") for x in prose()],
        ["日本語の文章です。" * 40],
    ]
    pages += [
        [x.replace("'", "’").replace("...", "…") for x in prose()],
        ["¡Olé! ¿Qué tal, señor?" for _ in range(9)],
    ]
    pages += [[f":) {x} ;-) http://a.org/{i}?q=1 me@b.net 10kg $5" for i, x in enumerate(prose())]]
    # Words that never repeat, so that no rule of repetition comes first.
    pool = [f"{x}{y}" for x in rare for y in ("", "s")]
    texts = [" ".join(["of the", *draw.sample(pool, 90)]) for _ in range(12)]
    cuts = [text.split() for text in texts]
    pages += [[texts[0][:150]], [texts[1] + " # ## #" * 6], [*texts[2].split(), "..."]]
    pages += [["- " + " ".join(cuts[3][i : i + 6]) + "." for i in range(0, 90, 6)]]
    pages += [[" ".join(cuts[4][i : i + 3]) + "." for i in range(0, 90, 3)]]
    pages += [[" ".join(cuts[5][i : i + 2]) for i in range(0, 90, 2)] + [texts[6] + "." * 2] * 1]
    pages += [[" ".join(word[:2] for word in cuts[7])], ["".join(cuts[8][:9]), *cuts[8][9:80]]]
    pages += [["zz".join(cuts[9][i : i + 3]) + " to" for i in range(0, 90, 3)]]
    pages += [[" ".join(cuts[10][i : i + 6]) for i in range(0, 90, 6)], [texts[11] + "…" * 20]]
    return ["\n".join(lines) for lines in pages]


def theirs(python: Path, texts: list[str]) -> tuple[list[dict[str, list]], dict[str, float]]:
    """datatrove's decisions, and its seconds for each preset."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        command = [str(python), "-W", "ignore", "-c", THEIRS, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    *lines, last = done.stdout.splitlines()
    return list(map(json.loads, lines)), json.loads(last)


def ours(texts: list[str]) -> tuple[list[dict[str, list]], dict[str, float]]:
    """Our decisions in the same form."""
    from openqwen.corpus.config import PublishedRules
    from openqwen.corpus.published import PublishedFilters

    filters = PublishedFilters(PublishedRules())
    answers: list[dict[str, list]] = [{} for _ in texts]
    seconds = {}
    for preset in PRESETS:
        start = time.process_time()
        for text, answer in zip(texts, answers):
            done = filters.apply(text, preset)
            rule = done.failed.rule if done.failed else ""
            answer[preset] = [not rule, rule, "" if rule else done.text]
        seconds[preset] = time.process_time() - start
    return answers, seconds


def main() -> None:
    """Compare, and print decisions that differ, reasons and rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datatrove", type=Path, required=True, help="its environment's Python")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="files of records with a text"
    )
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument(
        "--golden", type=Path, help="write the made pages with datatrove's decisions"
    )
    options = parser.parse_args()
    pages = made_pages()
    if options.golden:
        pages = [page for page in pages if len(page) < 20_000]
        lines = [
            json.dumps({"text": page, **{p: a[:2] for p, a in answer.items()}}, ensure_ascii=False)
            for page, answer in zip(pages, theirs(options.datatrove, pages)[0])
        ]
        options.golden.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    texts = [*pages, *(pieces(options.text, options.documents) if options.text else [])]
    size = sum(len(text.encode()) for text in texts) / 1e6
    right, slow = theirs(options.datatrove, texts)
    found, fast = ours(texts)
    print(f"{len(texts):,} documents, {size:.1f} MB")
    for preset in PRESETS:
        differ = [
            i
            for i, (a, b) in enumerate(zip(found, right))
            if (a[preset][0], a[preset][2]) != (b[preset][0], b[preset][2])
        ]
        kept = sum(answer[preset][0] for answer in right)
        rates = size / fast[preset], size / slow[preset]
        print(
            f"{preset}: {kept:,} kept; {len(differ)} decisions or texts differ; "
            f"{rates[0]:.1f} MB/s against {rates[1]:.2f} MB/s, {rates[0] / rates[1]:.0f} x"
        )
        reasons = Counter((b[preset][1], a[preset][1]) for a, b in zip(found, right))
        print(
            "   ",
            ", ".join(f"{t or 'kept'} = {o or 'kept'}: {n}" for (t, o), n in reasons.most_common()),
        )
        for i in differ[:5]:
            print(
                f"    {i}: ours {found[i][preset][:2]}, datatrove {right[i][preset][:2]}: {texts[i][:80]!r}"
            )
    sys.exit(any(a[p][0] != b[p][0] for a, b in zip(found, right) for p in PRESETS))


if __name__ == "__main__":
    main()
