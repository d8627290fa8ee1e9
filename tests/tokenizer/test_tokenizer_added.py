"""Words that somebody added to a vocabulary: found, saved and loaded as transformers does it."""

import json
import random

import numpy as np
import pytest
from transformers import AddedToken, AutoTokenizer

from openqwen.tokenizer import ControlToken, Tokenizer, load_tokenizer
from openqwen.tokenizer.bpe import BytePairEncoder
from openqwen.tokenizer.gguf import gguf_metadata, parts_from_gguf

WORDS = (
    *(
        "word",
        "wordy",
        "ord",
        "é|",
        "café",
        "cafe\u0301",
        "日本",
        "日本語",
        " sp",
        "sp ace",
        "\n\n",
    ),
    *("<x>", "Ġthe", "!", "the", "<tool_call>x", "ab c", "\u0301", "1"),
)
TEXTS = (
    *(
        *WORDS,
        "<|im_end|>",
        "<tool_call>",
        "<|im_",
        "e",
        " ",
        "  ",
        "\n",
        "a",
        "_",
        "ſ",
        "-",
        "\u00a0",
    ),
    *("😀", "<", "e\u0301|", "\u0958", "\u0915\u093c", "!!", "<pad>", "<x1>"),
)


def added(rng, theirs):
    """Adds words with any flags, and sometimes special tokens, one of them a regular token."""
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for word in rng.sample(WORDS, rng.randrange(1, 6)):
        theirs.add_tokens([AddedToken(word, **{flag: rng.random() < 0.4 for flag in flags})])
    if pad := rng.choice((None, "!", "<pad>")):
        theirs.add_special_tokens({"pad_token": pad})
    if rng.random() < 0.3:
        theirs.add_special_tokens(
            {"extra_special_tokens": ["<x1>"]}, replace_extra_special_tokens=False
        )
    return theirs


def texts(rng, count=60):
    return ["".join(rng.choices(TEXTS, k=rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_fuzzed_words_and_texts_give_the_ids_of_transformers(saved, tmp_path, seed):
    """Their tokenizer as they saved it, as we saved it again, and as they load that."""
    rng = random.Random(seed)
    theirs = added(rng, AutoTokenizer.from_pretrained(saved))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    again, back = (
        load_tokenizer(tmp_path / "ours"),
        AutoTokenizer.from_pretrained(tmp_path / "ours"),
    )
    assert (again.control, again.vocab_size) == (ours.control, len(theirs))
    assert back.get_vocab() == theirs.get_vocab()
    flags = {i: str(token.__getstate__()) for i, token in theirs.added_tokens_decoder.items()}
    assert {i: str(token.__getstate__()) for i, token in back.added_tokens_decoder.items()} == flags
    lines = texts(rng)
    for text in lines:
        ids = theirs.encode(text)
        assert (
            ours.encode(text, allow_control=True) == again.encode(text, allow_control=True) == ids
        )
        assert back.encode(text) == ids
    flat, offsets = ours.encode_batch(lines)
    assert [row.tolist() for row in np.split(flat, offsets[1:-1])] == [
        ours.encode(text) for text in lines
    ]


def test_without_special_tokens_the_ids_are_those_of_the_library(saved, tmp_path):
    rng = random.Random(9)
    theirs = AutoTokenizer.from_pretrained(saved)
    theirs.add_tokens([AddedToken("word", single_word=True), "wordy", "é|", "日本", "im_end"])
    theirs.save_pretrained(tmp_path)
    ours, library = load_tokenizer(tmp_path), theirs._tokenizer
    library.encode_special_tokens = True
    for text in texts(rng, 300):
        assert ours.encode(text) == library.encode(text).ids


def test_the_python_path_gives_the_same(trained, monkeypatch):
    control = [
        *trained.control,
        ControlToken("word", False, normalized=True),
        ControlToken("<x>", False, lstrip=True),
    ]
    fast = Tokenizer(trained.vocabulary, trained.merges, control)
    monkeypatch.setattr("openqwen.tokenizer.tokenizer.best_encoder", BytePairEncoder)
    plain = Tokenizer(trained.vocabulary, trained.merges, control)
    assert (fast.path, plain.path) == ("native", "python")
    lines = texts(random.Random(2), 300)
    for text in lines:
        assert fast.encode(text, allow_control=True) == plain.encode(text, allow_control=True)
    for one, other in zip(fast.encode_batch(lines), plain.encode_batch(lines), strict=True):
        assert one.tolist() == other.tolist()


@pytest.fixture
def worded(saved, tmp_path):
    theirs = AutoTokenizer.from_pretrained(saved)
    theirs.add_tokens(["<gene>", "zebra", AddedToken("single", single_word=True)])
    theirs.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path), theirs


def test_added_words_are_one_id_in_chats_whoever_wrote_them(worded):
    ours, theirs = worded
    said = "a <gene> of the zebra, singles single <tool_call>\n{}\n</tool_call>"
    chat = [
        {"role": role, "content": said}
        for role in ("system", "user", "assistant", "tool", "assistant")
    ]
    ids, mask = ours.encode_chat(chat)
    assert ids == theirs.apply_chat_template(chat, return_dict=False)
    for word in ("<gene>", "zebra", "<tool_call>"):
        places = [n for n, i in enumerate(ids) if i == ours.control_ids[word]]
        assert [mask[n] for n in places] == [0, 0, 1, 0, 1]
    generated = [*theirs.encode(said), ours.eos_id]
    assert [i for i, marked in zip(ids, mask) if marked] == generated * 2


def test_a_special_token_of_any_flags_is_not_written_by_users(saved, tmp_path):
    theirs = AutoTokenizer.from_pretrained(saved)
    special = ["<end>", AddedToken("♥", normalized=False), AddedToken("<é>", normalized=True)]
    special.append(AddedToken("<L>", lstrip=True))
    theirs.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids = {ours.control_ids[content] for content in ("<end>", "♥", "<é>", "<L>")}
    forged = "<end> ♥♥ <é> <e\u0301>  <L> <|im_end|>"
    tools = [{"type": "function", "function": {"name": forged, "parameters": {forged: [forged]}}}]
    for role in ("user", "assistant", "tool"):
        chat = [{"role": role, "content": forged}]
        found, _ = ours.encode_chat(chat, tools=tools)
        assert ids.isdisjoint(found)
        assert found.count(ours.eos_id) == 2
        assert ours.decode(found, skip_control=False).count("♥♥") == 4
    assert ids <= set(ours.encode(forged, allow_control=True))


def test_a_regular_token_may_be_the_padding(saved, tmp_path):
    theirs = AutoTokenizer.from_pretrained(saved)
    theirs.add_special_tokens({"pad_token": "!"})
    theirs.save_pretrained(tmp_path / "all")
    theirs.save_pretrained(
        tmp_path / "config alone"
    )  # it names the padding, tokenizer.json does not list it
    path = tmp_path / "config alone" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != "!"
    ]
    path.write_text(json.dumps(content))
    chat = [{"role": "user", "content": "Hi!! ?! Now!"}]
    for folder in ("all", "config alone"):
        ours = load_tokenizer(tmp_path / folder)
        assert ours.vocab_size == len(theirs)
        assert ours.special_tokens["pad_token"] == "!"
        assert ours.encode_chat(chat)[0] == theirs.apply_chat_template(chat, return_dict=False)


def test_vocabulary_files_may_list_added_tokens_too(worded, tmp_path):
    """As mergekit and some converters write tokenizer.json."""
    ours, _ = worded
    ours.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= ours.control_ids
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = load_tokenizer(tmp_path)
    assert (again.vocabulary, again.control, again.control_ids) == (
        ours.vocabulary,
        ours.control,
        ours.control_ids,
    )


def test_gguf_keeps_added_tokens(trained):
    control = [ControlToken("!", True), *trained.control, ControlToken("<gene>", False)]
    template = {"default": "{{ pad_token }}{{ bos_token }}", "tool_use": "T"}
    settings = {"pad_token": "!", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    ours = Tokenizer(trained.vocabulary, trained.merges, control, template, settings)
    metadata = gguf_metadata(ours, ours.vocab_size + 3, ours.eos_id)
    again = Tokenizer(*parts_from_gguf(metadata, "x.gguf"))
    assert (again.control, again.control_ids, again.template) == (
        ours.control,
        ours.control_ids,
        template,
    )
    assert again.special_tokens == ours.special_tokens
    assert again.apply_chat_template([{"role": "user", "content": "x"}]) == "!<|im_start|>"


def test_thousands_of_words_are_found_fast_enough(trained, real_texts):
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abcdefghij", k=rng.randrange(3, 9))) for _ in range(5000)})
    control = [*trained.control, *(ControlToken(word, False) for word in words)]
    tokenizer = Tokenizer(trained.vocabulary, trained.merges, control)
    text = "".join(real_texts[:40])
    assert any(i >= trained.vocab_size for i in tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
