"""The language of a text."""

import re
from functools import cache
from typing import Any

from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

# Those that the reference (langdetect) knows. Further ones would only be found in short texts.
_CODES = """
af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl
no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh
"""
KNOWN = tuple(_CODES.split())
_LONGEST = 10_000  # characters that are read, as in the reference
_ADDRESS = re.compile(r"https?://\S{1,2000}|[-\w.]{1,64}@[-\w.]{1,255}")


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, one of `KNOWN`; None where it has no letter.

    py3langid decides, on lower-case letters: the same text always has the same language.

    Raises:
        OpenQwenError: py3langid is not installed.
    """
    words = _ADDRESS.sub(" ", text[:_LONGEST]).lower()
    if not any(char.isalpha() for char in words):
        return None
    return str(_identifier().classify(words)[0])


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        what = "Instructions about the language of an answer need py3langid."
        raise OpenQwenError(what, do=pip_install("py3langid")) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([*KNOWN])
    return identifier
