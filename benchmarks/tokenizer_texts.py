"""Text that tries a tokenizer: whatever is at hand in many scripts, and strings made to be hard."""

import gzip
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

PIECE = 20_000  # characters of a text at most

# Scripts by their blocks, some of them more than once for their weight in the draw.
BLOCKS = (
    *(
        (0x20, 0x7E),
        (0x20, 0x7E),
        (0x00, 0x1F),
        (0x80, 0xFF),
        (0x100, 0x24F),
        (0x250, 0x2FF),
        (0x300, 0x36F),
    ),
    *(
        (0x370, 0x3FF),
        (0x400, 0x52F),
        (0x530, 0x58F),
        (0x590, 0x5FF),
        (0x600, 0x6FF),
        (0x700, 0x77F),
        (0x780, 0x7BF),
    ),
    *(
        (0x900, 0x97F),
        (0x980, 0x9FF),
        (0xA00, 0xA7F),
        (0xA80, 0xAFF),
        (0xB00, 0xB7F),
        (0xB80, 0xBFF),
        (0xC00, 0xC7F),
    ),
    *(
        (0xC80, 0xCFF),
        (0xD00, 0xD7F),
        (0xD80, 0xDFF),
        (0xE00, 0xE7F),
        (0xE80, 0xEFF),
        (0xF00, 0xFFF),
        (0x1000, 0x109F),
    ),
    *(
        (0x10A0, 0x10FF),
        (0x1100, 0x11FF),
        (0x1200, 0x137F),
        (0x13A0, 0x13FF),
        (0x1400, 0x167F),
        (0x1780, 0x17FF),
    ),
    *(
        (0x1800, 0x18AF),
        (0x1E00, 0x1EFF),
        (0x1F00, 0x1FFF),
        (0x2000, 0x206F),
        (0x2070, 0x209F),
        (0x20D0, 0x20FF),
    ),
    *(
        (0x2100, 0x214F),
        (0x2150, 0x218F),
        (0x2190, 0x22FF),
        (0x2460, 0x24FF),
        (0x2500, 0x27BF),
        (0x2800, 0x28FF),
    ),
    *(
        (0x2C00, 0x2D2F),
        (0x2E80, 0x2FDF),
        (0x3000, 0x303F),
        (0x3040, 0x309F),
        (0x30A0, 0x30FF),
        (0x3100, 0x312F),
    ),
    *(
        (0x3130, 0x318F),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0x4E00, 0x9FFF),
        (0xA000, 0xA4CF),
        (0xA640, 0xA69F),
    ),
    *(
        (0xAC00, 0xD7A3),
        (0xAC00, 0xD7A3),
        (0xE000, 0xF8FF),
        (0xF900, 0xFAFF),
        (0xFB00, 0xFDFF),
        (0xFE00, 0xFE0F),
    ),
    *(
        (0xFE20, 0xFE2F),
        (0xFF00, 0xFFEF),
        (0xFFF0, 0xFFFD),
        (0x10000, 0x100FF),
        (0x10300, 0x1034F),
        (0x10400, 0x1044F),
    ),
    *(
        (0x11000, 0x1107F),
        (0x12000, 0x123FF),
        (0x1D100, 0x1D1FF),
        (0x1D400, 0x1D7FF),
        (0x1E900, 0x1E95F),
    ),
    *(
        (0x1F1E6, 0x1F1FF),
        (0x1F300, 0x1F64F),
        (0x1F900, 0x1F9FF),
        (0x20000, 0x2A6DF),
        (0x2F800, 0x2FA1F),
    ),
    *(
        (0xE0001, 0xE007F),
        (0xE0100, 0xE01EF),
        (0x30000, 0x323AF),
        (0x105C0, 0x105FF),
        (0x16D40, 0x16D7F),
    ),
)
SNIPPETS = (
    *(
        "'s",
        "'T",
        "'re",
        "'VE",
        "'m",
        "'ll",
        "'Ld",
        "'d",
        "'ſ",
        "’s",
        " '",
        "don't",
        "I'LL've",
        "it''s",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " \n ",
        "\n \n",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
    ),
    *(
        "\u2028",
        "\u3000",
        "\ufeff",
        "\0",
        "\u200b",
        "\u200d",
        "\ufe0f",
        "\u00ad",
        "\u0301",
        "\u0323\u0301",
        "\u0345",
    ),
    *("1", "12", "1234567", "٣٤", "४५", "Ⅷ", "½", "²", "①", "3.14", "0x1F", "1_000", "2026-11-24"),
    *(
        "👩\u200d👩\u200d👧\u200d👦",
        "🇩🇪🇫",
        "👍🏽",
        "❤️",
        "🏴\U000e0067\U000e0062\U000e007f",
        "é",
        "e\u0301",
        "Å",
        "A\u030a",
        "ﬁ",
        "ß",
    ),
    *(
        "한국",
        "\u1112\u1161\u11ab",
        "क्षि",
        "กำ",
        "ﷺ",
        "日本語",
        "，。",
        "「」",
        "……",
        "——",
        "λx.x",
        "∑∫",
        "→",
        "│├──",
    ),
    *(
        "def f(x):\n    return x\n",
        "    ",
        "\t\t",
        "</div>",
        "&amp;",
        "http://a.b/c?d=e#f",
        "__init__",
        "camelCase",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
        "<|im_",
        "|>",
    ),
    *("<<|im_end|>>", "<|im_end|", "<|IM_END|>", "<| im_end |>", "[PAD151665]", "<tool_response>"),
)


def fuzzed(count: int, seed: int = 0) -> Iterator[str]:
    """Short strings of pieces at random: characters of all scripts, hard snippets, runs, bytes that are not UTF-8."""
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(rng) for _ in range(rng.choice((1, 2, 3, 5, 8, 13, 40))))


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.choice((1, 1, 2, 4, 9))))
    if kind < 0.75:
        return rng.choice(SNIPPETS)
    if kind < 0.82:
        return rng.choice(SNIPPETS) * rng.choice((2, 3, 7, 30))
    if kind < 0.90:
        return rng.randbytes(rng.randrange(1, 12)).decode(errors="replace")
    code_point = rng.randrange(0x110000 - 0x800)
    return chr(code_point + 0x800 * (code_point >= 0xD800))


def shared_data() -> Path:
    """The folder of text that may lie beside the repository."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("OPENQWEN_SHARED_DATA", default))


def records(name: str, field: str = "text") -> Iterator[str]:
    """The texts of one file of the shared data."""
    with gzip.open(shared_data() / name, "rb") as file:
        for line in file:
            yield json.loads(line)[field]


def python_files() -> Iterator[str]:
    """The sources of the Python installation and of the packages that run this."""
    folders = {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))}
    for folder in sorted(folders):
        for path in sorted(folder.rglob("*.py")):
            yield path.read_bytes().decode(
                errors="replace"
            )  # some tests of the library are not UTF-8


def scrambled(texts: Iterator[str], seed: int = 1) -> Iterator[str]:
    """The same texts damaged: bytes lost or changed here and there, as broken downloads have it."""
    rng = random.Random(seed)
    for text in texts:
        data = bytearray(text.encode())
        for _ in range(len(data) // 50):
            place = rng.randrange(len(data))
            data[place : place + rng.choice((0, 1, 1, 2))] = rng.randbytes(rng.choice((0, 1)))
        yield data.decode(errors="replace")


def mixed(size: int) -> Iterator[tuple[str, str]]:
    """(source, text) of about `size` bytes in all, in pieces; what the shared data lacks, code and fuzz make up for."""
    sources = {"fuzzed": (0.10, fuzzed(10**9, seed=2)), "code": (0.30, python_files())}
    if shared_data().is_dir():
        sources |= {
            "388 languages": (0.12, records("corpus/udhr2.jsonl.gz")),
            "languages damaged": (0.08, scrambled(records("corpus/udhr2.jsonl.gz"))),
            "classical Chinese": (0.15, records("corpus/classical_zh.jsonl.gz")),
            "English books": (0.20, records("corpus/books_en_train_1.jsonl.gz")),
            "mathematics": (0.05, records("eval/gsm8k_train.jsonl.gz", "answer")),
        }
    else:
        print("no shared data: code and fuzzed text only", file=sys.stderr)
    for name, (share, texts) in sources.items():
        left = share * size
        while left > 0 and (batch := "\n".join(islice(texts, 50))):
            for start in range(0, len(batch), PIECE):
                yield name, batch[start : start + PIECE]
                left -= len(batch[start : start + PIECE].encode(errors="replace"))
                if left <= 0:
                    break
