"""One fixed edition of Unicode, so that ids never change with the version of a library.

Letters and marks are added to Unicode every year, and Python's `unicodedata` and the `regex`
package follow. If the tokenizer followed too, one text could be split differently when a model is
trained and when it is served. The published Qwen2 tokenizers run in Hugging Face's `tokenizers`, so
this edition is that of its two libraries: letters and numbers of Unicode 16, canonical ordering and
composition of an older one. All that is newer is a symbol: not part of a word, and NFC neither
moves nor combines it.
"""

import unicodedata

import regex


def _class(ranges: str) -> str:
    """`"558 58b-58c"`, hexadecimal code points, as the inside of a bracketed character class."""
    return "".join(
        "-".join(rf"\U{int(end, 16):08X}" for end in span.split("-")) for span in ranges.split()
    )


# Letters and numbers that came after Unicode 16.
_NEWER_LETTERS = _class("""
    558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d 107bb-107bf
    10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb 11de0-11de9 11df1 1246f 12475-1247f
    12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2
    18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff
    1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e
    2cea2-2cead 323b0-33479 3d000-3fc3f""")
# Combining marks, then composites and their parts, that are newer than the NFC in `tokenizers`.
_NEWER_MARKS = _class("""
    5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c 10d24-10d27
    10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b
    113ce-113d0 1145e 11839-1183a 1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97
    11f41-11f42 1612f 16ff0-16ff1 1d127-1d128 1d250-1d252 1d25b-1d25c 1d25f 1d280-1d281 1e08f
    1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5 105c9-105e4
    11382-113c9 11930-11938 1611e-16129 16d63-16d6a""")

_LETTERS = regex.compile(f"[{_NEWER_LETTERS}]")
_MARKS = regex.compile(f"([{_NEWER_MARKS}])")
_SYMBOL = "\ue000"  # private use: the split expression sees a code point without properties


def mask_newer_letters(text: str) -> str:
    """`text` with each newer letter or number replaced by a symbol; the length stays the same."""
    return text if text.isascii() else _LETTERS.sub(_SYMBOL, text)


def normalize(text: str) -> str:
    """The text in NFC, with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if unicodedata.is_normalized("NFC", text):
        return text
    # Nothing moves across a newer mark, so the text between two of them is normalised by itself.
    return "".join(unicodedata.normalize("NFC", part) for part in _MARKS.split(text))
