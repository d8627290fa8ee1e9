"""The rows of pre-training: every token predicted once, quotas held, documents isolated or joined,
long rows asked for.

Checked against the definition in plain Python: where each predicted token may come from, and how
often.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.packed_dataset import DataConfig, DocumentSampler, PackedDataset

END = 7


class Source:
    """Documents whose tokens are all different; the last of each is END, as `<|endoftext|>` is."""

    def __init__(self, lengths, first=1_000):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.first = first

    def document(self, number):
        start = self.first + int(self.lengths[:number].sum())
        return np.append(np.arange(start, start + self.lengths[number] - 1), END).astype(np.uint32)


def pieces(sources, seed=3, tokenizer=None, **data):
    generators = Generators(seed)
    return PackedDataset(
        DocumentSampler(sources, generators), DataConfig(**data), generators, tokenizer
    )


def rows(plan):
    """Every row that the steps read, in order."""
    return [
        ids.tolist() for step in range(plan.steps) for micro in plan.batch(step) for ids, _ in micro
    ]


def read(plan):
    """How often each document is read: (source, number) -> times."""
    return Counter(zip(plan._source.tolist(), plan._number.tolist(), strict=True))


lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    a=lengths_of_documents, b=lengths_of_documents, context=st.integers(2, 40), tokens=st.integers(2, 900),
    batch=st.integers(1, 200), micro=st.integers(1, 200), isolated=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_token_is_predicted_once_a_pass_however_it_is_cut(
    a, b, context, tokens, batch, micro, isolated, seed
):
    sources = {"a": Source([*a, 5], 1_000), "b": Source([*b, 9], 500_000)}
    made = [
        pieces(
            sources, seed, tokens=tokens, context=context, batch_tokens=batch_tokens, micro_tokens=micro_tokens,
            isolated=isolated, mixture={"a": 0.5},
        )
        for batch_tokens, micro_tokens in ((batch, micro), (10**6, 10**6), (1, 1))
    ]  # fmt: skip
    found = [rows(plan) for plan in made]
    assert found[0] == found[1] == found[2]
    plan = made[0]
    expected = Counter()
    for (source, number), times in read(plan).items():
        document = plan.sources[source].document(number).tolist()
        for token in document[1 if isolated else 0 :]:
            expected[token] += times
    predicted = Counter(token for row in found[0] for token in row[1:])
    assert all(2 <= len(row) <= context + 1 for row in found[0])
    if isolated:
        assert predicted == expected
        return
    missing = expected - predicted  # the stream's very first token has nothing before it
    assert predicted - expected == Counter()
    assert missing.total() == 1
    assert sum(len(row) < context + 1 for row in found[0]) <= 1


@settings(max_examples=60, deadline=None)
@given(
    a=lengths_of_documents, b=lengths_of_documents, tokens=st.integers(50, 2_000), share=st.floats(0, 1),
    isolated=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_quotas_hold_within_one_document_and_passes_are_whole(a, b, tokens, share, isolated, seed):
    sources = {"a": Source([*a, 5]), "b": Source([*b, 9], 500_000)}
    plan = pieces(
        sources,
        seed,
        tokens=tokens,
        context=16,
        isolated=isolated,
        mixture={"a": share, "b": 1 - share},
    )
    for number, (name, part) in enumerate((("a", share), ("b", 1 - share))):
        source = sources[name]
        chosen = plan._number[plan._source == number]
        given_tokens = int((source.lengths[chosen] - isolated).sum())
        longest = int(source.lengths.max())
        assert round(part * tokens) <= given_tokens < round(
            part * tokens
        ) + longest or given_tokens == 0 == round(part * tokens)
        usable = [n for n in range(len(source.lengths)) if source.lengths[n] >= 2]
        times = Counter(chosen.tolist())
        assert not set(times) - set(usable)
        assert max(times[n] for n in usable) - min(times[n] for n in usable) <= 1


@settings(max_examples=40, deadline=None)
@given(
    long=st.lists(st.integers(40, 150), min_size=1, max_size=6), short=lengths_of_documents,
    share=st.floats(0.1, 0.6), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_longest_rows_get_their_share_from_long_documents(long, short, share, seed):
    sources = {"books": Source([*long, *short]), "posts": Source([*short, 3], 500_000)}
    tokens = 20_000
    plan = pieces(
        sources, seed, tokens=tokens, context=32, lengths={32: share, 8: 1 - share},
        mixture={"books": 0.7, "posts": 0.3}, batch_tokens=500,
    )  # fmt: skip
    sizes = plan.rows[:, 1] - 1
    assert sizes[sizes == 32].sum() / tokens == pytest.approx(share, abs=150 / tokens)
    assert sizes.sum() == pytest.approx(tokens, abs=200)
    for row in rows(plan):
        assert END not in row[:-1]


def test_joined_rows_of_several_lengths_hold_their_shares():
    plan = pieces(
        {"a": Source(range(3, 60))},
        tokens=40_000,
        context=64,
        lengths={64: 0.4, 32: 0.35, 16: 0.25},
        isolated=False,
    )
    sizes = plan.rows[:, 1] - 1
    for length, share in ((64, 0.4), (32, 0.35), (16, 0.25)):
        assert sizes[sizes == length].sum() / sizes.sum() == pytest.approx(share, abs=0.005)
    assert sum(n not in (16, 32, 64) for n in sizes) <= 1


def test_rows_longer_than_any_document_are_refused_with_the_sources():
    sources = {"a": Source([20, 30]), "b": Source([5])}
    with pytest.raises(
        OpenQwenError,
        match=r"rows of 25, but the sources with documents that long \(a\) have only 20%",
    ):
        pieces(
            sources,
            tokens=1_000,
            context=25,
            lengths={25: 0.4, 8: 0.6},
            mixture={"a": 0.2, "b": 0.8},
        )
    with pytest.raises(OpenQwenError, match=r"isolated: false"):
        pieces(sources, tokens=1_000, context=99, lengths={99: 0.4, 8: 0.6})


@pytest.mark.parametrize("isolated", [True, False])
def test_a_source_without_a_usable_document_is_named(isolated):
    sources = {"a": Source([20, 30]), "empty": Source([1, 1, 1])}
    with pytest.raises(OpenQwenError, match="The source 'empty' has no usable document"):
        pieces(sources, tokens=100, context=16, mixture={"empty": 0.5, "a": 0.5}, isolated=isolated)
    assert rows(pieces(sources, tokens=100, context=16, isolated=isolated))
    with pytest.raises(OpenQwenError, match="No source has a usable document"):
        pieces({"empty": Source([1])}, tokens=100, isolated=isolated)


def test_a_mixture_of_unknown_sources_is_refused():
    with pytest.raises(OpenQwenError, match="Did you mean 'code'"):
        pieces({"code": Source([5])}, mixture={"cod": 1.0})
    with pytest.raises(OpenQwenError, match="sum to"):
        pieces({"code": Source([5])}, mixture={"code": 0.5})


def test_a_later_stage_goes_on_where_the_supply_stopped():
    sources, generators = {"a": Source([9] * 20)}, Generators(1)
    sampler = DocumentSampler(sources, generators)
    plans = [PackedDataset(sampler, DataConfig(tokens=80, context=8), generators) for _ in range(2)]
    assert Counter(n for plan in plans for n in plan._number.tolist()) == Counter(range(20))


class Texts:
    """Tokenized texts."""

    def __init__(self, texts, tokenizer):
        self.ids = [
            np.array([*tokenizer.encode(text), tokenizer.endoftext_id], dtype=np.uint32)
            for text in texts
        ]
        self.lengths = np.array([len(ids) for ids in self.ids])

    def document(self, number):
        return self.ids[number]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        iter(["def add(one, two):\n    return one + two  # añadir 加\n"] * 9),
        TokenizerConfig(vocabulary=300),
    )


def parts(tokenizer, row):
    """Prefix, suffix and middle of a row as texts, by the published layout; None where it is no
    such row.
    """
    prefix, suffix, middle = (
        tokenizer.control_ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle")
    )
    if row[0] != prefix:
        return None
    assert [row.count(marker) for marker in (prefix, suffix, middle)] == [1, 1, 1]
    assert row[-1] == tokenizer.endoftext_id
    a, b = row.index(suffix), row.index(middle)
    return [tokenizer.decode(ids) for ids in (row[1:a], row[a + 1 : b], row[b + 1 : -1])]


def test_fill_in_middle_moves_the_middle_of_some_documents_and_loses_nothing(tokenizer):
    texts = [f"def añadir_{n}(x):\n    return x + {n}  # 加\n" for n in range(200)]
    sources = {"code": Texts(texts, tokenizer), "docs": Texts(texts[:50], tokenizer)}
    tokens = int(sum((s.lengths - 1).sum() for s in sources.values()))
    options = {
        "tokens": tokens,
        "context": 200,
        "batch_tokens": 500,
        "fill_in_middle": {"code": 0.5},
    }
    plan = pieces(sources, tokenizer=tokenizer, **options)
    found = rows(plan)
    assert found == rows(pieces(sources, tokenizer=tokenizer, **options))
    moved = [split for row in found if (split := parts(tokenizer, row))]
    plain = [tokenizer.decode(row[:-1]) for row in found if parts(tokenizer, row) is None]
    assert sorted([pre + mid + suf for pre, suf, mid in moved] + plain) == sorted(
        texts + texts[:50]
    )
    assert len(moved) == pytest.approx(100, abs=25)
    assert len({(len(pre), len(mid)) for pre, _, mid in moved}) > 60
    # Some cuts fall within what is one token of the whole text.
    whole = [tokenizer.encode(pre + mid + suf) for pre, suf, mid in moved]
    assert any(
        tokenizer.encode(pre) != ids[: len(tokenizer.encode(pre))]
        for (pre, *_), ids in zip(moved, whole)
    )
    joined = pieces(sources, tokenizer=tokenizer, isolated=False, **options)
    stream = sorted(joined.rows.tolist())
    ids = [token for n, (a, b) in enumerate(stream) for token in joined._read(a, b)[bool(n) :]]
    assert ids.count(tokenizer.control_ids["<|fim_middle|>"]) == pytest.approx(100, abs=25)


def test_fill_in_middle_leaves_what_does_not_fit_a_row_and_is_off_by_default(tokenizer):
    source = {"code": Texts(["x = 1\n" * 30, "y = 2\n"], tokenizer)}
    plan = pieces(source, tokenizer=tokenizer, tokens=900, context=16, fill_in_middle={"code": 1.0})
    markers = {tokenizer.control_ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle")}
    cut = [row for row in rows(plan) if markers & set(row)]
    assert cut
    assert all(parts(tokenizer, row) for row in cut)
    assert not any(
        markers & set(row)
        for row in rows(pieces(source, tokenizer=tokenizer, tokens=900, context=16))
    )


def test_fill_in_middle_of_an_unknown_source_or_without_markers_is_refused(tokenizer):
    source = {"code": Texts(["x = 1\n" * 3], tokenizer)}
    with pytest.raises(OpenQwenError, match="Did you mean 'code'"):
        pieces(source, tokenizer=tokenizer, tokens=50, fill_in_middle={"cod": 0.5})
    qwen2 = type(tokenizer)(tokenizer.vocabulary, tokenizer.merges, tokenizer.control[:3])
    with pytest.raises(OpenQwenError, match=r"no <\|fim_prefix\|>"):
        pieces(source, tokenizer=qwen2, tokens=50, fill_in_middle={"code": 0.5})


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("lengths", [[90] * 9, [7, 300, 7, 60, 60, 7, 7, 80]])
def test_no_step_is_empty_where_rows_are_longer_than_a_batch(isolated, lengths):
    plan = pieces(
        {"a": Source(lengths)}, tokens=600, context=60, batch_tokens=10, isolated=isolated
    )
    told = [sum(len(micro) for micro in plan.batch(step)) for step in range(plan.steps)]
    assert min(told) > 0
    assert sum(told) == len(plan.rows)
    long = [row for row in rows(plan) if len(row) - 1 > 10]
    assert plan.steps >= len(long)
