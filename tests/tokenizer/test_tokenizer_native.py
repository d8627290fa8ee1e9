"""The compiled encoder gives the ids of the Python one, whatever the text and the merges."""

import copy
import pickle
import random
import threading
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openqwen.support import native
from openqwen.tokenizer import Tokenizer, fast
from openqwen.tokenizer.bpe import BytePairEncoder
from openqwen.tokenizer.pretokenize import split_words
from openqwen.tokenizer.unicode import normalize

fuzz = settings(max_examples=400, derandomize=True, deadline=None)
BYTES = [bytes([byte]) for byte in range(256)]
SCRIPTS = (
    *(
        "aZ",
        "é",
        "ßı",
        "Жд",
        "αΩ",
        "א",
        "ب",
        "ي",
        "न्",
        "क",
        "ก",
        "ำ",
        "あ",
        "ア",
        "漢",
        "明月",
        "한",
        "국",
        "ᄒ",
        "ᅡ",
        "𝒳",
    ),
    *(
        "𐍈",
        "😀",
        "👩\u200d🚀",
        "ﬁ",
        "ſ",
        "ˈ",
        "٣",
        "४",
        "²",
        "Ⅷ",
        "一",
        "。",
        "、",
        "！",
        "“",
        "”",
        "…",
        "\u3000",
        "\xa0",
        "\x85",
    ),
)
pieces = st.one_of(
    st.characters(),  # surrogates too
    st.characters(max_codepoint=0x7F),
    st.sampled_from(SCRIPTS),
    st.sampled_from(
        [
            "\n",
            "\r",
            "\r\n",
            " ",
            "  ",
            "\t",
            "\x0b",
            "\x1c",
            "'s",
            "'LL",
            "'ſ",
            "'r",
            "'",
            " '",
            "_",
            "1",
        ]
    ),
    st.sampled_from(
        ["\u0558", "\U0001df2b", "\U000323b0", "\u07fd", "\ue000", "\U0010ffff", "\u0301"]
    ),
    st.builds(
        lambda c, n: c * n, st.sampled_from(["a", " ", "\n", "漢", "é", "-"]), st.integers(1, 80)
    ),
)
texts = st.lists(pieces, max_size=30).map("".join)


def encoders(vocabulary, merges):
    """(compiled, Python) on the same merges; vocabulary names the tokens that merges do not
    make.
    """
    if fast.library() is None:
        pytest.skip("there is no C++ compiler here")
    return fast.NativeEncoder(fast.library(), vocabulary, merges), BytePairEncoder(
        vocabulary, merges
    )


def pair(tokenizer):
    ids = {token: i for i, token in enumerate(tokenizer.vocabulary)}
    both = [
        (a, b, ids[tokenizer.vocabulary[a] + tokenizer.vocabulary[b]]) for a, b in tokenizer.merges
    ]
    return encoders(tokenizer.vocabulary, both)


@pytest.fixture(scope="module")
def both(trained):
    return pair(trained)


def test_tokenizers_say_which_path_they_take(trained, monkeypatch):
    assert trained.path == ("python" if fast.library() is None else "native")
    fast.library.cache_clear()
    monkeypatch.setenv("OPENQWEN_NATIVE", "0")
    try:
        plain = Tokenizer(trained.vocabulary, trained.merges)
        assert plain.path == "python"
        assert plain.encode("It's 2026") == trained.encode("It's 2026")
    finally:
        fast.library.cache_clear()


def test_fuzzed_text(both):
    compiled, python = both

    @fuzz
    @example("")
    @example("'ſ don'T 'S'll '")
    @example(" \n \n  x\n\n y  ")
    @given(texts)
    def check(text):
        text = normalize(text)
        assert compiled.encode(text) == python.encode(text)

    check()


def completions(token, rng, tries=12):
    """Texts that hold the bytes of a token that begins or ends inside a character."""
    fills = [bytes([rng.randrange(0x80, 0xC0)]) * n for n in range(4)]
    leads = [
        b"",
        *(
            bytes([lead]) + fill
            for lead in rng.choices(range(0xC3, 0xF3), k=tries)
            for fill in fills[:3]
        ),
    ]
    for lead in leads:
        for tail in fills:
            try:
                yield (lead + token + tail).decode()
            except UnicodeDecodeError:
                continue


def test_fuzzed_text_with_the_real_vocabulary(real):
    """Among it the two sides of merges that join pieces of characters: there, characters may not be
    merged first.
    """
    compiled, python = pair(real)
    rng = random.Random(0)
    broken = [token for token in real.vocabulary if "\ufffd" in token.decode(errors="replace")]
    straddling = [
        token for token in broken if any(byte < 0x80 or byte >= 0xC0 for byte in token[1:])
    ]
    assert len(straddling) > 300
    hard = [text for token in broken for text in completions(token, rng)]
    assert len(hard) > 5000
    for text in hard:
        text = normalize(f"你{text}好 {text}")
        assert compiled.encode(text) == python.encode(text)

    @fuzz
    @given(
        st.lists(
            st.one_of(
                pieces,
                st.sampled_from(hard),
                st.characters(min_codepoint=0x3000, max_codepoint=0xD7A3),
            )
        )
    )
    def check(parts):
        text = normalize("".join(parts))
        assert compiled.encode(text) == python.encode(text)

    check()


def test_any_merges():
    """Vocabularies at random, straddling tokens and pairs listed twice among them."""
    rng = random.Random(0)
    characters = "ab é漢字し😀"
    alphabet = characters.encode()
    for _ in range(60):
        vocabulary, merges = list(BYTES), []
        ids = {token: i for i, token in enumerate(vocabulary)}
        for _ in range(rng.randrange(120)):
            left, right = (
                rng.choice([rng.choice(alphabet), rng.randrange(len(vocabulary))]) for _ in range(2)
            )
            token = vocabulary[left] + vocabulary[right]
            if token not in ids:
                ids[token] = len(vocabulary)
                vocabulary.append(token)
            merges.append((left, right, ids[token]))
        compiled, python = encoders(vocabulary, merges)
        for _ in range(60):
            text = "".join(rng.choices(characters, k=rng.choice([3, 8, 30, 200])))
            assert compiled.encode(text) == python.encode(text), (merges, text)


@pytest.mark.parametrize("unit", ["a", "é", "漢", "😀", " ", "\n", "-", "abcab", " \n", "'", "1"])
def test_a_long_run_of_one(both, unit):
    compiled, python = both
    text = unit * ((1_000_000 if unit == "a" else 200_000) // len(unit.encode()))
    assert compiled.encode(text) == python.encode(text)


@pytest.mark.parametrize("length", [*range(1, 34), 62, 63, 64, 65, 66, 127, 128, 129, 257])
def test_every_length_of_word(both, length):
    compiled, python = both
    rng = random.Random(length)
    for alphabet in ("ethrnai", "etéя", "漢字し"):
        text = "".join(rng.choices(alphabet, k=length))
        for around in (text, f" {text} {text}", f"{text}\n" * 40):
            assert compiled.encode(around) == python.encode(around)


def test_words_that_share_a_cache_line_do_not_mix(both):
    compiled, python = both
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 12))) for _ in range(150_000)]
    text = " ".join(words)
    expected = python.encode(text)
    assert compiled.encode(text) == expected
    assert compiled.encode(text) == expected


def test_words_are_those_of_the_expression():
    """With no merges but enough to tell words apart: a byte pair merges inside a word only."""
    merges = [(a, b, 256 + 256 * a + b) for a in range(256) for b in range(256)]
    vocabulary = BYTES + [bytes([a, b]) for a in range(256) for b in range(256)]
    compiled, python = encoders(vocabulary, merges)

    @fuzz
    @given(texts)
    def check(text):
        text = normalize(text)
        ids = compiled.encode(text)
        assert ids == python.encode(text)
        sizes = [len(word.encode()) for word in split_words(text)]
        assert b"".join(vocabulary[i] for i in ids) == text.encode()
        assert len(ids) >= sum((size + 1) // 2 for size in sizes)

    check()


def test_batches_equal_texts_one_by_one(trained, real_texts):
    texts = [*real_texts, "", "naïve cafe\u0301", "\ud800", ""] * 3
    expected = [trained.encode(text) for text in texts]
    for threads in (1, 2, None):
        ids, offsets = trained.encode_batch(texts, threads=threads)
        assert (ids.dtype, offsets.dtype, len(offsets)) == ("uint32", "int64", len(texts) + 1)
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
    ids, offsets = trained.encode_batch([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_batches_of_the_python_path_are_the_same(both, real_texts):
    for compiled, python in zip(
        both[0].encode_batch(real_texts[:20]), both[1].encode_batch(real_texts[:20])
    ):
        assert compiled.dtype == python.dtype
        assert compiled.tolist() == python.tolist()


def test_many_threads_at_once(trained, real_texts):
    expected = [trained.encode(text) for text in real_texts]
    wrong = []

    def work(seed):
        order = random.Random(seed).sample(range(len(real_texts)), len(real_texts))
        wrong.extend(i for i in order if trained.encode(real_texts[i]) != expected[i])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles_encode_the_same(trained):
    text = "It's 2026 — naïve"
    for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert other.encode(text) == trained.encode(text)
        assert (other.path, other.control, other.template) == (
            trained.path,
            trained.control,
            trained.template,
        )


def test_no_code_point_beyond_the_table_has_a_class():
    beyond = normalize("".join(map(chr, range(0x40000, 0x110000, 7))))
    assert split_words(beyond) == [beyond]


def test_native_code_is_one_build_for_all(monkeypatch, tmp_path):
    """Built once into the cache, found there again, off when told so, and absent with one
    warning.
    """
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    monkeypatch.delenv("OPENQWEN_NATIVE", raising=False)
    monkeypatch.setenv("OPENQWEN_CACHE", str(tmp_path / "cache"))
    if native.load("seven", [source]) is None:
        pytest.skip("there is no C++ compiler here")
    (built,) = (tmp_path / "cache" / "native").glob("*.so")
    native._load.cache_clear()
    stamp = built.stat().st_mtime_ns
    assert native.load("seven", [source]).seven() == 7
    assert built.stat().st_mtime_ns == stamp
    monkeypatch.setenv("OPENQWEN_NATIVE", "0")
    assert native.load("seven", [source]) is None
    monkeypatch.delenv("OPENQWEN_NATIVE")
    native._load.cache_clear()
    with monkeypatch.context() as bare:  # the compiler may go once it has done its work
        bare.setenv("PATH", "")
        bare.delenv("CXX", raising=False)
        bare.setattr("importlib.util.find_spec", lambda name: None)
        assert native.load("seven", [source]).seven() == 7
    source.write_text('extern "C" int seven() { return 8; }')
    native._load.cache_clear()
    assert native.load("seven", [source]).seven() == 8  # another source is another build


@pytest.mark.parametrize(
    ("source", "compiler", "complaint"),
    [("no C++", None, "failed, see"), ("", "/nowhere/c++", "did not run"), ("", "false", "failed")],
)
def test_without_a_library_the_reason_is_logged_once(
    monkeypatch, tmp_path, caplog, source, compiler, complaint
):
    path = tmp_path / "broken.cpp"
    path.write_text(source)
    monkeypatch.delenv("OPENQWEN_NATIVE", raising=False)
    monkeypatch.setenv("OPENQWEN_CACHE", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    native._load.cache_clear()
    for _ in range(2):
        assert native.load("broken", [path]) is None
    assert len(caplog.records) == 1
    assert complaint in caplog.text or "no C++ compiler" in caplog.text
