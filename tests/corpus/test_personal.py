"""What is masked, what is not, and that masking is stable."""

import random
import re
import string

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openqwen.corpus import CorpusConfig
from openqwen.corpus.documents import read_documents
from openqwen.corpus.personal import _KINDS, mask_personal


@pytest.mark.parametrize(
    ("text", "kind", "masked"),
    [
        ("Write to Ann.Lee+x@mail.server.co.uk!", "email", "Write to name@example.com!"),
        ("(bob@site.org)", "email", "(name@example.com)"),
        ("server 8.8.8.8, port 53", "ip address", "server 192.0.2.1, port 53"),
        ("at 93.184.216.34.", "ip address", "at 192.0.2.1."),
        ("card 4111 1111 1111 1111", "card", "card <card number>"),
        ("5555-5555-5555-4444;", "card", "<card number>;"),
        ("IBAN DE89 3704 0044 0532 0130 00", "bank account", "IBAN <bank account>"),
        ("GB82WEST12345698765432,", "bank account", "<bank account>,"),
        ("call +49 (30) 901820 today", "phone", "call <phone number> today"),
        ("+1-202-456-1111", "phone", "<phone number>"),
    ],
)
def test_personal_data_is_masked_and_counted(text, kind, masked):
    assert mask_personal(text) == (masked, {kind: 1})


@pytest.mark.parametrize(
    "text",
    [
        "name@example.com and user@example.org",
        "decorate with @property, or a @ b, or x@y",
        "192.168.0.1, 10.0.0.1, 127.0.0.1 and 192.0.2.7 are private",
        "version 1.2.3 and section 3.4.5.6.7, 999.1.1.1",
        "4111 1111 1111 1112",  # its check digit is wrong
        "0000 0000 0000 0000",
        "DE88 3704 0044 0532 0130 00",
        "pi = 3.14159265358979323846, 2024-11-05 12:30:00",
        "1 + 23456789012345 = x and a+4930901820",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_other_text_stays(text):
    assert mask_personal(text) == (text, {})


@given(st.text(alphabet=string.ascii_letters + string.digits + "@.+-() ", max_size=300))
def test_masking_twice_changes_nothing(text):
    once, _ = mask_personal(text)
    assert mask_personal(once) == (once, {})


def repeats(pattern):
    """The upper bounds of all repetitions in a parsed pattern."""
    for operation, value in pattern:
        if operation in (re._constants.MAX_REPEAT, re._constants.MIN_REPEAT):
            yield value[1]
        parts = value if isinstance(value, tuple | list) else [value]
        for part in parts:
            if isinstance(part, re._parser.SubPattern):
                yield from repeats(part)


def test_no_pattern_repeats_without_bound():
    """So hostile text takes linear time."""
    for kind in _KINDS.values():
        bounds = list(repeats(re._parser.parse(kind.pattern.pattern)))
        assert bounds
        assert max(bounds) <= 64


def test_the_corpus_stage_masks_or_drops_and_counts(tmp_path):
    from openqwen.corpus.build import build_corpus

    raw = tmp_path / "raw"
    raw.mkdir()
    draw = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    for number in range(20):
        lines = [" ".join(draw.choices(words, k=40)) + "." for _ in range(5)]
        if number < 5:
            lines.append(f"Mail to person{number}@mail.org now, please, or to the list of names.")
        (raw / f"{number:02}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    rules = {"text": {"gopher": {"min_stop_words": 0, "min_word_length": 1}}}
    for action, kept in (("keep", 20), ("mask", 20), ("drop", 15)):
        out = tmp_path / action
        out.mkdir()
        config = CorpusConfig(folder=raw, filters=rules, personal=action, heldout_share=0.2)
        metrics = build_corpus(config, [], out)
        documents = [
            *read_documents(out / "train.parquet"),
            *read_documents(out / "heldout.parquet"),
        ]
        assert len(documents) == kept
        texts = "".join(document["text"] for document in documents)
        assert ("@mail.org" in texts) == (action == "keep")
        assert texts.count("name@example.com") == (5 if action == "mask" else 0)
        rows = pq.read_table(out / "decisions.parquet").to_pylist()
        whys = [row["why"] for row in rows if row["step"] == "personal"]
        assert whys == ([] if action == "keep" else ["1 email"] * 5)
        assert metrics.get("personal_dropped") == {"keep": None, "mask": 0, "drop": 5}[action]
