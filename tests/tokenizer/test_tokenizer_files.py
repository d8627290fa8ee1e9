"""What is saved loads in transformers and here, to the same ids; what is damaged is named."""

import json

import pytest
from transformers import AutoTokenizer

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer

TEXT = (
    "It's 2026 — naïve cafe\u0301, 日本語 👩\u200d🚀\n\n\tdef f(x):\r\n  return x  "
    "<|im_end|><tool_call> end "
)


@pytest.mark.parametrize("files", ["all", "vocab and merges"])
def test_transformers_loads_the_same_tokenizer(trained, saved, tmp_path, files, real_texts):
    for name in (
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        *(["tokenizer.json"] * (files == "all")),
    ):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert len(other) == trained.vocab_size
    for text in [TEXT, *real_texts[:50]]:
        ids = other(text)["input_ids"]
        assert ids == trained.encode(text, allow_control=True)
        for skip in (True, False):
            assert other.decode(ids, skip_special_tokens=skip) == trained.decode(ids, skip)
    assert (other.eos_token_id, other.pad_token_id) == (trained.eos_id, trained.endoftext_id)
    assert other.bos_token is None
    assert [other.convert_tokens_to_ids(t.content) for t in CONTROL_TOKENS] == list(
        trained.control_ids.values()
    )
    chat = [{"role": "user", "content": "Hi <b>\n"}, {"role": "assistant", "content": "Yes"}]
    assert other.apply_chat_template(chat, tokenize=False) == trained.apply_chat_template(chat)


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    load_tokenizer(saved).save(tmp_path / "again")
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_loads_from_the_file_alone_and_what_transformers_saved(trained, saved, tmp_path):
    assert load_tokenizer(saved / "tokenizer.json").encode(TEXT) == trained.encode(TEXT)
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT, allow_control=True) == trained.encode(TEXT, allow_control=True)
    assert again.control == trained.control
    chat = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(chat) == trained.apply_chat_template(chat)


def test_merges_as_strings_load_too(trained, saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).merges == trained.merges


def test_three_control_tokens_as_in_qwen2(trained, tmp_path):
    Tokenizer(trained.vocabulary, trained.merges, CONTROL_TOKENS[:3]).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(trained.vocabulary) + 3
    assert tokenizer.template is None
    other = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_end|><tool_call>"
    assert tokenizer.encode(text, allow_control=True) == other(text)["input_ids"]


def _drop(*path):
    def damage(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return damage


def _put(value, *path):
    def damage(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_drop("model"), "model"),
        (_drop("model", "merges"), "model.merges"),
        (_drop("added_tokens"), "added_tokens"),
        (_put("WordPiece", "model", "type"), "model.type"),
        (_put(True, "model", "ignore_merges"), "model.ignore_merges"),
        (_put("seven", "model", "vocab", "a"), "model.vocab.a"),
        (_put(7, "model", "vocab", "a"), "without a gap"),
        (_drop("model", "vocab", "a"), "without a gap"),
        (_put(1500, "model", "vocab", "日"), "stands for no byte"),
        (_put(1500, "model", "vocab", ""), "is empty"),
        (_put(["a", "zzz"], "model", "merges", 5), "merge 5"),
        (_put("a", "model", "merges", 5), "merge 5"),
        (_put(3, "added_tokens", 0, "id"), "do not follow"),
        (_put("<|im_end|>", "added_tokens", 5, "content"), "twice"),
        (_put("<|other|>", "added_tokens", 2, "content"), "control token <|im_end|> is missing"),
        (_put({"type": "NFKC"}, "normalizer"), "other rules"),
        (_put({"type": "ByteLevel"}, "pre_tokenizer"), "other rules"),
        (_put(r"\s+", "pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "other rules"),
    ],
)
def test_damaged_files_are_named(saved, tmp_path, damage, complaint):
    content = json.loads((saved / "tokenizer.json").read_text())
    damage(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OpenQwenError) as caught:
        load_tokenizer(tmp_path)
    assert complaint in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_vocabulary_without_all_bytes_is_damaged(saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text())
    names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    names[names.index("a")] = "aéaéaé"
    content["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OpenQwenError, match="lacks 1 of the 256 bytes"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_needs_all_bytes(trained):
    with pytest.raises(OpenQwenError, match="lacks 1 of the 256 bytes"):
        Tokenizer(trained.vocabulary[1:256], [])


@pytest.mark.parametrize("cut", [0, 1, 1000])
def test_a_truncated_file_is_an_error(saved, tmp_path, cut):
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes()[:cut])
    with pytest.raises(OpenQwenError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_missing_files_and_broken_templates_are_errors(saved, tmp_path):
    with pytest.raises(OpenQwenError, match="missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).template is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(OpenQwenError, match="chat_template is not text"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(OpenQwenError, match="not UTF-8"):
        load_tokenizer(tmp_path)
