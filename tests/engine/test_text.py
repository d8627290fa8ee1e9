"""Text as it grows: any cut of it into tokens, and any stop texts."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

from openqwen.engine.text import TextStream
from openqwen.tokenizer import Tokenizer

WORDS = tokenizer()


class Cut:
    """A tokenizer of one text, whose ids are pieces of its bytes."""

    def __init__(self, pieces):
        self._pieces = pieces

    def is_hidden(self, i):
        return False

    def token_bytes(self, i):
        return self._pieces[i]


alphabet = st.text(st.sampled_from("abc é漢🙂\n"), max_size=30)


@given(
    alphabet,
    st.lists(st.integers(0, 80)),
    st.lists(st.text(st.sampled_from("abc é漢"), min_size=1, max_size=4)),
)
def test_any_cut_gives_the_same_text_and_stops_at_the_same_place(text, cuts, stops):
    data = text.encode()
    at = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(at)]
    stream, given_ = TextStream(Cut(pieces), stops), ""
    for number in range(len(pieces)):
        given_ += stream.push(number)
        assert text.startswith(given_)
        if stream.stopped:
            break
    given_ += stream.finish()
    # As if the characters came one by one: the first stop text to be complete ends the text, the
    # longest of several.
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert stream.stopped == bool(found)
    assert given_ == (text[: min(found)[1]] if found else text)


@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_come_as_the_tokenizer_decodes_them(data):
    words: Tokenizer = WORDS
    ids = [words.vocabulary.index(bytes([b])) for b in data]
    stream = TextStream(words)
    assert "".join(map(stream.push, ids)) + stream.finish() == words.decode(ids)


def test_control_tokens_are_left_out():
    stream = TextStream(WORDS, ["<|im_end|>"])
    assert stream.push(WORDS.eos_id) == ""
    assert not stream.stopped
