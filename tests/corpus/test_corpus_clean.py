"""Normalisation, wrapped lines, and the edits that cut parts out of documents."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from openqwen.corpus.clean import c4_lines, logical_lines, long_pieces, normalize, without
from openqwen.corpus.config import C4


def test_normalize():
    raw = "\ufeffCafe\u0301 \t\r\nline\rtwo\x00\x1b[0m\x0cpage\n\n\n\n\n\nend  \n\n"
    assert normalize(raw) == "Café\nline\ntwo[0m\npage\n\n\nend\n"
    assert normalize("def f():\n\tif x:\n\t\treturn  1") == "def f():\n\tif x:\n\t\treturn  1\n"


@given(st.text())
def test_normalize_once_is_enough(text):
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)


def test_a_long_run_of_spaces_is_linear():
    assert len(normalize("a" + " " * 2_000_000 + "b")) == 2_000_003


def test_logical_lines_undo_wraps_and_keep_lists():
    wrapped = "x" * 70
    text = (
        f"{wrapped}\nlast line\nheading\n{wrapped}\n- item\n- "
        f"item\n\n{wrapped}\n\nalone\n{'y' * 200}\nnext"
    )
    assert [len(group) for group in logical_lines(text)] == [2, 1, 1, 1, 1, 1, 1, 1, 1]


def test_c4_cuts_lines_and_marks():
    lines = [
        "Good line of words [3].",
        "",
        "Menu",
        "",
        "Please enable JavaScript to go on",
        "We use cookies to track you",
    ]
    text = "\n".join([*lines, "The end [edit] is near", ""])
    kept, cut = c4_lines(text, C4())
    assert kept == "Good line of words .\n\nThe end  is near\n"
    assert cut == ["Menu", "Please enable JavaScript to go on", "We use cookies to track you"]


def test_a_repeated_paragraph_is_known_however_it_is_wrapped():
    licence = "This text may be copied freely\nby anyone who keeps this note."
    [(_, key)] = long_pieces(f"One.\n\n{licence}\n\nShort.\n", code=False, min_characters=30)
    rewrapped = "Two.\n\nThis text may be copied\nfreely by anyone who keeps this note.\n\nShort.\n"
    [(span, same)] = long_pieces(rewrapped, code=False, min_characters=30)
    assert same == key
    assert without(rewrapped, [span]) == "Two.\n\nShort.\n"


def test_of_code_only_comments_are_pieces():
    header = "# Copyright the authors.\n# Licensed to everybody,\n# without any warranty.\n"
    text = f"import os  # why\n{header}def main():\n    print('the same body in both files')\n"
    [((start, end), _)] = long_pieces(text, code=True, min_characters=30)
    assert text[start:end] == header
    assert long_pieces(text, code=True, min_characters=300) == []
