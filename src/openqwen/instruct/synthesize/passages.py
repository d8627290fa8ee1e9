"""Cuts documents into passages of whole sentences, from one line of text to megabytes."""

import re

_BREAK = re.compile(r"\n[ \t\r]*\n\s*")
# Behind a full stop (and a closing quotation mark), but not behind a title such as "Mr.".
_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Dr", "St", "Prof"))
_SENTENCE = re.compile(
    rf"(?<=[.!?。！？…][\"'”’」』）)])\s*|(?<=[.!?…]){_TITLES}\s+|(?<=[。！？])(?![\"'”’」』）)])"
)
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def passages(text: str, shortest: int, longest: int) -> list[str]:
    """Stretches of a text that begin and end where a paragraph or a sentence does.

    Paragraphs are joined up to `longest` characters; a longer one is cut between its sentences.
    What is shorter than `shortest`, or one sentence longer than `longest`, is left out.
    """
    found: list[str] = []
    current = ""
    for piece, glue in _pieces(text, longest):
        if len(piece) > longest:
            found.append(current)
            current = ""
        elif current and len(current) + len(glue) + len(piece) > longest:
            found.append(current)
            current = piece
        else:
            current = f"{current}{glue}{piece}" if current else piece
    return [one for one in (*found, current) if len(one) >= shortest]


def _pieces(text: str, longest: int) -> list[tuple[str, str]]:
    """Paragraphs, or the sentences of a long one, each with what stands before it."""
    pieces = []
    for paragraph in _BREAK.split(text.strip()):
        if len(paragraph) <= longest:
            pieces.append((paragraph, "\n\n"))
            continue
        glue = "" if _CHINESE.search(paragraph[:1000]) else " "
        sentences = [one for one in _SENTENCE.split(paragraph) if one]
        pieces += [(one, glue if n else "\n\n") for n, one in enumerate(sentences)]
    return pieces


def is_chinese(text: str) -> bool:
    """Whether more than a quarter of the characters are Chinese."""
    return len(_CHINESE.findall(text)) > len(text) / 4


def length(text: str) -> int:
    """Words of a text; for a Chinese one its characters without white space."""
    return len("".join(text.split())) if is_chinese(text) else len(text.split())


def rounded(count: int) -> int:
    """A count as a person would say it: two significant digits, at least 10."""
    step = 10 ** max(1, len(str(count)) - 2)
    return max(10, round(count / step) * step)


def excerpt(text: str, longest: int) -> str:
    """A text, or its beginning, middle and end, for a model whose context is shorter."""
    if len(text) <= longest:
        return text
    part = longest // 3
    middle = (len(text) - part) // 2
    return "\n[…]\n".join([text[:part], text[middle : middle + part], text[-part:]])
