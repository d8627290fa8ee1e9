"""The steps as pure functions: their verdicts, and the same from several processes as from one."""

import copy
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest

from openqwen.corpus.clean import long_pieces
from openqwen.corpus.config import CorpusConfig, FilterConfig
from openqwen.corpus.process import (
    Cut,
    DocumentVerdict,
    apply_filters,
    cap,
    clean,
    cut_repeats,
    drop_exact,
    drop_near,
)
from openqwen.corpus.report import Account

PAGE = "The harbour lay quiet in the early light.\n\nMenu\n\nBy noon the market was open again.\n"
RULES = FilterConfig()


def document(text, profile="text", name="a"):
    return {"id": name, "text": text, "source": "s", "language": "", "meta": {"profile": profile}}


@pytest.mark.parametrize(
    ("step", "text", "profile", "verdict", "left"),
    [
        (clean, "One \r\nline\x00", "text", DocumentVerdict("clean"), "One\nline\n"),
        (clean, PAGE, "text", DocumentVerdict("clean"), PAGE),
        (
            clean,
            PAGE,
            "web",
            DocumentVerdict("clean", cut=Cut("c4 lines", "Menu", 6)),
            PAGE.replace("Menu\n\n", ""),
        ),
        (
            clean,
            "Menu\n",
            "web",
            DocumentVerdict("clean", "empty", "nothing left after cleaning"),
            "Menu\n",
        ),
        (
            apply_filters,
            "too short\n",
            "text",
            DocumentVerdict("filter", "word count", "2, wanted 50 to 100,000", value=2),
            "too short\n",
        ),
    ],
)
def test_verdicts(step, text, profile, verdict, left):
    given = document(text, profile)
    before = copy.deepcopy(given)
    assert step(given, RULES) == (verdict, before | {"text": left})
    assert given == before
    assert verdict.kept == (verdict.rule is None)


def test_verdicts_that_depend_on_other_documents():
    given = document("text")
    assert cap(given, True, {"s": 3000})[0] == DocumentVerdict(
        "cap", "s limit", "source limited to 3,000 bytes"
    )
    assert cap(given, False, {"s": 3000})[0].kept
    assert drop_exact(given, "a")[0].kept
    assert drop_exact(given, "0")[0] == DocumentVerdict(
        "exact", "exact duplicate", "same text as 0"
    )
    assert drop_near(given, "a")[0].kept
    assert drop_near(given, "0")[0] == DocumentVerdict("near", "near-duplicate", "like 0")


def test_repeats_are_cut_and_a_document_of_nothing_else_is_dropped():
    licence = "This text may be copied freely by anyone who keeps this note.\n\n"
    given = document(f"One.\n\n{licence}Two.\n")
    assert cut_repeats(given, []) == (DocumentVerdict("paragraphs"), given)
    [(span, _)] = long_pieces(given["text"], code=False, min_characters=30)
    cut = Cut("repeated paragraph", licence, len(licence))
    left = given | {"text": "One.\n\nTwo.\n"}
    assert cut_repeats(given, [span]) == (DocumentVerdict("paragraphs", cut=cut), left)
    verdict, left = cut_repeats(document(licence), [(0, len(licence))])
    assert (verdict.rule, left["text"]) == ("nothing else", "\n")


def test_every_byte_is_kept_dropped_or_cut():
    """A document that the line rules emptied was counted twice."""
    documents = [document(PAGE, "web", "0"), document("Menu\n", "web", "1"), document("x\n")]
    recorded = []
    account = Account(lambda *pair: recorded.append(pair))
    step = partial(clean, config=RULES)
    kept = [d for d in documents if account.kept(d, [step]) is not None]
    report = account.steps["clean"].json()
    assert (report["kept"], report["dropped"], len(kept)) == (2, 1, 2)
    size = sum(len(d["text"]) for d in documents)
    assert report["kept_bytes"] + report["dropped_bytes"] == size
    assert {reason: r["documents"] for reason, r in report["reasons"].items()} == {
        "c4 lines": 1,
        "empty": 1,
    }


def clean_and_filter(given):
    verdict, changed = clean(given, CorpusConfig().filters)
    return verdict, apply_filters(changed, CorpusConfig().filters)


def test_several_processes_decide_as_one():
    documents = [document(f"{PAGE * n} {n}", ("web", "text", "code")[n % 3]) for n in range(30)]
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(clean_and_filter, documents)) == list(map(clean_and_filter, documents))


def test_accounts_of_parts_add_up_to_the_account_of_the_whole():
    documents = [document("x " * n, name=str(n)) for n in range(1, 80, 7)]
    step = partial(apply_filters, config=RULES)
    whole, first, merged = (Account(lambda *_: None) for _ in range(3))
    for given in documents:
        whole.kept(given, [step])
    for part in (documents[:5], documents[5:]):
        first = Account(lambda *_: None)
        for given in part:
            first.kept(given, [step])
        merged.merge(first.json())
    assert merged.json() == whole.json()
    assert whole.json()["filter"]["dropped"] > 5


def test_processes_that_filter_load_no_torch():
    code = "import sys, openqwen.corpus.work; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
