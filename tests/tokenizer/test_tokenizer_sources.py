"""One tokenizer in all the kinds of files that Qwen models come in: every reader finds the same."""

import base64
import json

import pytest
from transformers import AutoTokenizer

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer
from openqwen.tokenizer.gguf import parts_from_gguf
from openqwen.tokenizer.pretokenize import to_characters

TEXT = (
    "It's 2026 — naïve cafe\u0301, 日本語 👩\u200d🚀\n\n\tdef f(x):\r\n  return x  "
    "<|im_end|><tool_call> end "
)
CHAT = [{"role": "user", "content": "Hi"}]


def same(a, b):
    """All that decides ids, texts and chats."""
    return (a.vocabulary, a.merges, a.control, a.template) == (
        b.vocabulary,
        b.merges,
        b.control,
        b.template,
    )


def ranks(tokenizer):
    return "".join(
        f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokenizer.vocabulary)
    )


def metadata(tokenizer, padding=3):
    """As llama.cpp's converter writes it."""
    names = [to_characters(token) for token in tokenizer.vocabulary]
    size = tokenizer.vocab_size
    shown = {"<tool_call>", "</tool_call>"}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": names
        + [token.content for token in tokenizer.control]
        + [f"[PAD{i}]" for i in range(size, size + padding)],
        "tokenizer.ggml.token_type": [1] * len(names)
        + [4 if token.content in shown else 3 for token in tokenizer.control]
        + [5] * padding,
        "tokenizer.ggml.merges": [f"{names[a]} {names[b]}" for a, b in tokenizer.merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.endoftext_id,
        "tokenizer.ggml.bos_token_id": tokenizer.endoftext_id,
        "tokenizer.chat_template": tokenizer.template,
    }


def test_gguf_metadata(trained):
    assert same(Tokenizer(*parts_from_gguf(metadata(trained), "x.gguf")), trained)
    old = metadata(trained)  # early converters called padding rows tokens of the user
    old["tokenizer.ggml.token_type"] = [
        4 if kind == 5 else kind for kind in old["tokenizer.ggml.token_type"]
    ]
    assert same(Tokenizer(*parts_from_gguf(old, "x.gguf")), trained)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("tokenizer.ggml.model", "llama", "another kind: llama"),
        ("tokenizer.ggml.pre", "deepseek-llm", "another kind: gpt2, deepseek-llm"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens is missing"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges is missing"),
        ("tokenizer.ggml.merges", ["a zzzz"], "merge 0"),
        ("tokenizer.ggml.token_type", [1, 1], "2 token types"),
        ("tokenizer.ggml.eos_token_id", 10**6, "beyond"),
    ],
)
def test_damaged_gguf_metadata_is_named(trained, key, value, complaint):
    damaged = metadata(trained) | {key: value}
    with pytest.raises(OpenQwenError, match=complaint) as caught:
        parts_from_gguf(damaged, "x.gguf")
    assert caught.value.where == "x.gguf"


def test_ranks_hold_the_merges(trained, tmp_path):
    (tmp_path / "qwen.tiktoken").write_text(ranks(trained))
    for source in (tmp_path, tmp_path / "qwen.tiktoken"):
        loaded = load_tokenizer(source)
        assert (loaded.vocabulary, loaded.merges) == (trained.vocabulary, trained.merges)
        assert loaded.control == CONTROL_TOKENS[:3]
        assert loaded.template is None


def test_ranks_take_control_tokens_and_template_from_the_files_beside_them(
    trained, saved, tmp_path
):
    (tmp_path / "qwen.tiktoken").write_text(ranks(trained))
    (tmp_path / "tokenizer_config.json").write_bytes((saved / "tokenizer_config.json").read_bytes())
    assert same(load_tokenizer(tmp_path), trained)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: [*lines[:-1], "no line"], "is not base64"),
        (lambda lines: [*lines[:-1], "!!! 1499"], "is not base64"),
        (lambda lines: lines[:300] + lines[301:], "rank 301, not 300"),
        (lambda lines: [*lines[:-1], lines[300].split()[0] + " 1499"], "occurs twice"),
        (lambda lines: lines[1:2] + lines[1:], "rank 1, not 0"),
        (
            lambda lines: [f"{base64.b64encode(b'zzzzzzzzz').decode()} 0"],
            "lacks 256 of the 256 bytes",
        ),
        (
            lambda lines: [*lines[:-1], f"{base64.b64encode('漢字漢字'.encode()).decode()} 1499"],
            "two earlier tokens",
        ),
    ],
)
def test_damaged_ranks_are_named(trained, tmp_path, change, complaint):
    (tmp_path / "qwen.tiktoken").write_text("\n".join(change(ranks(trained).splitlines())))
    with pytest.raises(OpenQwenError, match=complaint):
        load_tokenizer(tmp_path)


def test_vocabulary_and_merges(trained, saved, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    bare = load_tokenizer(tmp_path)
    assert same(bare, Tokenizer(trained.vocabulary, trained.merges, CONTROL_TOKENS[:3]))
    (tmp_path / "tokenizer_config.json").write_bytes((saved / "tokenizer_config.json").read_bytes())
    for source in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        assert same(load_tokenizer(source), trained)
    vocabulary = json.loads(
        (tmp_path / "vocab.json").read_text()
    )  # some tools list control tokens here too
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | trained.control_ids))
    assert same(load_tokenizer(tmp_path), trained)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("merges.txt", b"#version: 0.2\na b c\n", "merge 0"),
        ("merges.txt", b"\xff", "not UTF-8"),
        ("merges.txt", None, "missing"),
        ("vocab.json", b"[1]", "does not map tokens to ids"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {}}}',
            "does not map ids to tokens",
        ),
        ("tokenizer_config.json", b"[]", "not an object"),
    ],
)
def test_damaged_vocabulary_and_merges_are_named(saved, tmp_path, name, content, complaint):
    for other in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OpenQwenError, match=complaint) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


def test_what_is_no_tokenizer_is_an_error_that_says_what_would_be(tmp_path):
    with pytest.raises(OpenQwenError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(OpenQwenError, match="missing"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(OpenQwenError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "model.bin")
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_text("")
    with pytest.raises(OpenQwenError, match=r"2 \*\.tiktoken files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("apart", [False, True])
def test_saving_keeps_the_settings_and_the_place_of_the_template(trained, saved, tmp_path, apart):
    settings = {
        "eos_token": "<|endoftext|>",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    first, second = tmp_path / "first", tmp_path / "second"
    Tokenizer(
        trained.vocabulary, trained.merges, trained.control, trained.template, settings, apart
    ).save(first)
    assert (first / "chat_template.jinja").exists() == apart
    assert ("chat_template" in json.loads((first / "tokenizer_config.json").read_text())) == (
        not apart
    )
    load_tokenizer(first).save(second)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    other = AutoTokenizer.from_pretrained(second)
    assert (other.eos_token, other.model_max_length) == ("<|endoftext|>", 32768)
    assert other.apply_chat_template(CHAT, tokenize=False) == trained.apply_chat_template(CHAT)


def test_a_template_left_in_the_folder_does_not_outlive_its_tokenizer(trained, tmp_path):
    Tokenizer(trained.vocabulary, trained.merges, template="old", template_apart=True).save(
        tmp_path
    )
    trained.save(tmp_path)
    assert load_tokenizer(tmp_path).template == trained.template


def test_what_transformers_saved_loads_and_saves_again(trained, saved, tmp_path):
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path / "theirs")
    load_tokenizer(tmp_path / "theirs").save(tmp_path / "ours")
    assert same(load_tokenizer(tmp_path / "ours"), trained)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    assert before.get_vocab() == after.get_vocab()
    assert before.all_special_tokens == after.all_special_tokens
    assert before(TEXT)["input_ids"] == after(TEXT)["input_ids"]
    assert before.apply_chat_template(CHAT, tokenize=False) == after.apply_chat_template(
        CHAT, tokenize=False
    )


def test_the_real_vocabulary(real, real_saved, tmp_path):
    assert (len(real.vocabulary), len(real.merges), real.vocab_size) == (151643, 151387, 151665)
    assert (real.endoftext_id, real.im_start_id, real.eos_id) == (151643, 151644, 151645)
    assert real.control == CONTROL_TOKENS
    assert real.encode("Hello, 世界! 2024") == [9707, 11, 220, 99489, 0, 220, 17, 15, 17, 19]
    assert real.encode("<|im_start|><tool_call><|file_sep|>", allow_control=True) == [
        151644,
        151657,
        151664,
    ]
    assert same(load_tokenizer(real_saved), real)
    (tmp_path / "qwen.tiktoken").write_text(ranks(real))
    assert load_tokenizer(tmp_path).merges == real.merges


def test_transformers_loads_the_real_vocabulary_as_we_saved_it(real, real_saved):
    other = AutoTokenizer.from_pretrained(real_saved)
    assert len(other) == 151665
    assert (other.eos_token_id, other.pad_token_id, other.bos_token_id) == (151645, 151643, None)
    for text in (TEXT, "", " ", "한국어 텍스트, العربية नमस्ते ไทย"):
        assert other(text)["input_ids"] == real.encode(text, allow_control=True)


def test_a_real_tokenizer_of_qwen2_keeps_its_three_control_tokens(real, tmp_path):
    Tokenizer(real.vocabulary, real.merges, CONTROL_TOKENS[:3]).save(tmp_path)
    again, other = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.vocab_size, again.control) == (151646, CONTROL_TOKENS[:3])
    assert len(other) == 151646
    text = "<|im_end|><tool_call>"
    assert again.encode(text, allow_control=True) == other(text)["input_ids"]
