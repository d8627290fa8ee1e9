"""Languages on the Universal Declaration of Human Rights; licences, programs and kinds by hand."""

import gzip
import json
from pathlib import Path

import pytest

from openqwen.corpus.identify import (
    identify,
    kind_of,
    language_of,
    licence_of,
    programming_language,
)

pytest.importorskip("py3langid")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "corpus"
# Of the 29 languages of Qwen2's report those that the declaration and the model both have.
DECLARATION = {
    "eng": "en", "fra": "fr", "deu_1996": "de", "spa": "es", "por_PT": "pt", "ita": "it",
    "nld": "nl", "rus": "ru", "ces": "cs", "pol": "pl", "arb": "ar", "heb": "he", "tur": "tr",
    "jpn": "ja", "kor": "ko", "vie": "vi", "tha": "th", "ind": "id", "khm": "km", "hin": "hi",
    "ben": "bn", "urd": "ur", "ell_monotonic": "el", "swe": "sv", "fin": "fi", "cmn_hans": "zh",
}  # fmt: skip
PROSE = "The harbour lay quiet in the early light, and the boats were being unloaded. " * 20


@pytest.fixture(scope="module")
def declarations():
    if not (path := SHARED / "udhr2.jsonl.gz").exists():
        pytest.skip("shared/data is absent")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        records = map(json.loads, file)
        return {record["lang"]: record["text"] for record in records}


def test_languages_of_the_declaration_of_human_rights(declarations):
    found = {name: language_of(declarations[name]) for name in DECLARATION if name in declarations}
    assert len(found) > 20
    wrong = {name: code for name, code in found.items() if code != DECLARATION[name]}
    assert len(wrong) <= 1, wrong


def test_a_text_of_a_few_letters_has_no_language():
    assert language_of("12 + 30 = 42 ok") == ""
    assert language_of("これは日本語の文章です。漢字も仮名も使います。") == "ja"
    assert language_of("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏") == "zh"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("// SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note\nint x;", "GPL-2.0-only WITH Linux-syscall-note"),
        ('# Licensed under the Apache License, Version 2.0 (the "License");', "Apache-2.0"),
        (" * Permission is hereby granted, free\n * of charge, to any person obtaining\n * a copy", "MIT"),
        ("This file is part of X, under the GNU General Public License as published\nby the FSF, version 3", "GPL-3.0"),
        ("https://creativecommons.org/licenses/by-nc-sa/4.0/", "CC-BY-NC-SA-4.0"),
        (PROSE, ""),
    ],
)  # fmt: skip
def test_licences(text, licence):
    assert licence_of(text) == licence


def test_programs_and_kinds():
    assert programming_language(".hpp", "") == "c++"
    assert programming_language("", "#!/usr/bin/env python3\n") == "python"
    assert programming_language(".xyz", "text") == ""
    assert kind_of(PROSE, ".txt") == "text"
    assert kind_of(PROSE, ".md") == "manual"
    assert kind_of(PROSE * 100, ".md") == "book"
    assert kind_of("- a\n- b\n1. c\nend\n", "") == "list"
    assert kind_of("Anna: Hello.\nBob: Hi.\nAnna: Bye.\nBob: Bye.\n", "") == "dialogue"


def test_what_a_document_came_with_stays():
    meta = {"profile": "web", "license": "mine"}
    given = {"id": "a.html", "text": PROSE + "MIT", "source": "s", "language": "xx", "meta": meta}
    found = identify(given)
    assert (found["language"], found["meta"]["license"], found["meta"]["kind"]) == (
        "xx",
        "mine",
        "text",
    )
    code = {**given, "id": "x/a.rs", "language": "", "meta": {"profile": "code"}}
    found = identify(code)
    assert (found["language"], found["meta"]["programming_language"]) == ("", "rust")
    assert given["meta"] == meta
