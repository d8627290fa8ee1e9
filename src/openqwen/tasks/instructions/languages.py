"""The language of a text."""

import re
from functools import cache
from typing import Any

from openqwen.support.errors import OpenQwenError
from openqwen.support.command import pip_install

_LONGEST = 10_000  # characters that are read, as the reference (langdetect) reads
_ADDRESS = re.compile(r"https?://\S{1,2000}|[-\w.]{1,64}@[-\w.]{1,255}")


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None where it has no letter.

    py3langid decides, on lower-case letters: the same text always has the same language.
    """
    words = _ADDRESS.sub(" ", text[:_LONGEST]).lower()
    if not any(char.isalpha() for char in words):
        return None
    return str(_classifier().classify(words)[0])


@cache
def _classifier() -> Any:
    try:
        import py3langid
    except ImportError:
        what = "Instructions about the language of an answer need py3langid."
        raise OpenQwenError(what, do=pip_install("py3langid")) from None
    return py3langid
