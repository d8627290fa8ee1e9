"""Normalisation, wrapped lines, and the edits that cut parts out of documents."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from openqwen.corpus.clean import RepeatedParagraphs, c4_lines, logical_lines, normalize
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


def test_repeated_paragraphs_stay_in_the_first_document():
    repeats = RepeatedParagraphs(30)
    licence = "This text may be copied freely\nby anyone who keeps this note."
    first = f"One.\n\n{licence}\n\nShort.\n"
    assert repeats.cut(first, code=False) == (first, [])
    rewrapped = "Two.\n\nThis text may be copied\nfreely by anyone who keeps this note.\n\nShort.\n"
    assert repeats.cut(rewrapped, code=False)[0] == "Two.\n\nShort.\n"


def test_in_code_only_comments_are_cut():
    repeats = RepeatedParagraphs(30)
    header = "# Copyright the authors.\n# Licensed to everybody,\n# without any warranty.\n"
    body = "def main():\n    print('the same body in both of the files')\n"
    assert repeats.cut(header + body, code=True)[1] == []
    text, cut = repeats.cut("import os  # why\n" + header + body, code=True)
    assert text == "import os  # why\n" + body
    assert cut == [header]
