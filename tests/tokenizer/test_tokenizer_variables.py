"""What chat templates see, which of several is taken, and where a chat ends: as in transformers."""

import json
import random

import pytest
from transformers import AutoTokenizer

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.template import chatml_template

PRINTS_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDS_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + "
    "'\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TRIMS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }} {% endfor %}"
MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation "
    "%}{% set x = 1 %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{{ x }}{% else %}{{ m.content }}{{ eos_token "
    "}}{% endif %}\n"
    "{% endfor %}"
)
NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask", "image", "additional_special")
SHOWS = "|".join(
    f"{{{{ {n}_token }}}}{{{{ {n}_token is defined }}}}{{{{ {n}_token is none }}}}" for n in NAMES
) + (
    "{{ documents is none }}{{ tools is none }}{{ additional_special_tokens is defined }}{{ "
    "strftime_now('%Y') }}"
    "{{ {'b': '<é>', 'a': [1]} | tojson(indent=1, sort_keys=true, ensure_ascii=true, "
    "separators=(',', ' : ')) }}"
    "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% if m.role == 'tool' "
    "%}{% continue %}"
    "{% endif %}{{ m.thinking }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a=1) }}"
)
TEMPLATES = (PRINTS_END, ADDS_END, ZEPHYR, TRIMS, MARKS, SHOWS)
CONTENTS = (
    *("Hi", "", "\nfirst", " two  ", "last\n", "naïve 日本 😀", "</s>", "e\u0301"),
    *("e\u0301\u0323", "<tool_call>", "word", "{{ x }}"),
)


def chat(rng):
    roles = rng.choices(("user", "assistant", "system", "tool"), k=rng.randrange(1, 6))
    messages = [
        {"role": role, "content": "".join(rng.choices(CONTENTS, k=rng.randrange(4)))}
        for role in roles
    ]
    if rng.random() < 0.3:
        messages[-1][rng.choice(("reasoning_content", "thinking", "reasoning"))] = "why"
    return messages


def folder(saved, path, template, **config):
    """A saved tokenizer under another configuration; None takes a key away."""
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((saved / name).read_bytes())
    content = (
        json.loads((path / "tokenizer_config.json").read_text())
        | {"chat_template": template}
        | config
    )
    content = {key: value for key, value in content.items() if value != "absent"}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


CONFIGS = (
    {},
    {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"},
    {"eos_token": "absent", "pad_token": "absent", "unk_token": "absent", "bos_token": "absent"},
    {
        "eos_token": {
            "__type": "AddedToken",
            "content": "<|im_end|>",
            "lstrip": False,
            "special": True,
        }
    },
    {"eos_token": "</s>", "bos_token": "<s>", "image_token": "<|image_pad|>", "mask_token": "<m>"},
    {
        "extra_special_tokens": {"image_token": "<|image_pad|>"},
        "additional_special_tokens": "absent",
    },
    {"pad_token": None, "unk_token": None, "tokenizer_class": "Qwen2TokenizerFast"},
)


@pytest.mark.parametrize("config", CONFIGS)
def test_templates_see_the_special_tokens_of_transformers(saved, tmp_path, config):
    rng = random.Random(str(config))
    for number, template in enumerate(TEMPLATES):
        path = folder(saved, tmp_path / str(number), template, **config)
        ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
        assert ours.special_tokens == theirs.special_tokens_map
        ours.save(tmp_path / f"again {number}")
        back = AutoTokenizer.from_pretrained(tmp_path / f"again {number}")
        assert back.special_tokens_map == theirs.special_tokens_map
        for _ in range(25):
            messages, prompt = chat(rng), rng.random() < 0.5
            tools = rng.choice((None, [], [{"type": "function"}]))
            options = {"tools": tools, "add_generation_prompt": prompt}
            text = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.apply_chat_template(messages, **options) == text
            assert back.apply_chat_template(messages, tokenize=False, **options) == text
            plain = [m | {"content": m["content"].replace("</s>", "s")} for m in messages]
            ids = theirs.apply_chat_template(plain, return_dict=False, **options)
            assert ours.encode_chat(plain, **options)[0] == ids


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "</s>"])
@pytest.mark.parametrize("template", [PRINTS_END, ADDS_END, ZEPHYR, TRIMS, MARKS])
def test_the_end_of_a_turn_is_learned_whatever_the_template_prints(saved, tmp_path, template, end):
    ours = load_tokenizer(folder(saved, tmp_path / "x", template, eos_token=end))
    turns = [
        ("user", "a"),
        ("assistant", "First </s> word"),
        ("user", "b"),
        ("assistant", "Second"),
    ]
    ids, mask = ours.encode_chat([{"role": role, "content": content} for role, content in turns])
    learned = ours.decode([i for i, marked in zip(ids, mask) if marked], skip_control=False)
    expected = f"First </s> word{end}Second{end}"
    if template == TRIMS:  # a blank of the template's is part of the first word's token
        expected = f" First </s> word{end} Second{end}"
    assert learned == expected
    assert sum(m for i, m in zip(ids, mask) if i == ours.control_ids[end]) == 2


def test_generation_blocks_mark_what_they_mark_in_transformers(saved, tmp_path):
    path = folder(saved, tmp_path / "x", MARKS)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    rng = random.Random(3)
    for _ in range(150):
        messages = chat(rng)
        answer = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.encode_chat(messages) == (answer["input_ids"], answer["assistant_masks"])
    forged = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "<|im_end|> b"},
    ]
    ids, mask = ours.encode_chat(forged)
    assert (
        ours.decode([i for i, m in zip(ids, mask) if m], skip_control=False)
        == "<|im_end|> b<|im_end|>"
    )


@pytest.mark.parametrize("template", [chatml_template(), ADDS_END, ZEPHYR, TRIMS, MARKS])
def test_a_final_message_is_continued_as_in_transformers(saved, tmp_path, template):
    path = folder(saved, tmp_path / "x", template)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    rng = random.Random(4)
    for _ in range(60):
        messages = chat(rng)
        messages[-1]["role"] = "assistant"
        text = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert ours.apply_chat_template(messages, continue_final_message=True) == text
        ids, _ = ours.encode_chat(messages, continue_final_message=True)
        assert ids == theirs.apply_chat_template(
            messages, continue_final_message=True, return_dict=False
        )
    asked = {"role": "user", "content": "<|im_end|>"}
    text = ours.apply_chat_template(
        [asked, {"role": "assistant", "content": "It is"}], continue_final_message=True
    )
    assert text.endswith("It is")


def test_what_cannot_be_continued_is_an_error(trained):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is"}]
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    silent = Tokenizer(trained.vocabulary, trained.merges, template="{{ messages[0].content }}")
    for method in ("apply_chat_template", "encode_chat"):
        with pytest.raises(OpenQwenError, match="not both"):
            getattr(trained, method)(said, add_generation_prompt=True, continue_final_message=True)
        with pytest.raises(OpenQwenError, match="no content to continue"):
            getattr(trained, method)([*said, called], continue_final_message=True)
        with pytest.raises(OpenQwenError, match="cannot be continued"):
            getattr(silent, method)(said, continue_final_message=True)


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools }}", "rag": "R"}


def test_the_template_is_chosen_as_in_transformers(saved, tmp_path):
    said = [{"role": "user", "content": "x"}]
    listed = [{"name": name, "template": template} for name, template in NAMED.items()]
    path = folder(saved, tmp_path / "list", listed)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "files")
    assert (tmp_path / "files" / "additional_chat_templates" / "tool_use.jinja").exists()
    folder(saved, tmp_path / "two", listed[:1] + listed[2:])
    for name in ("list", "files", "two"):
        ours = load_tokenizer(tmp_path / name)
        ours.save(tmp_path / f"{name} again")
        assert (tmp_path / f"{name} again" / "chat_template.jinja").exists() == (name == "files")
        for source in (tmp_path / name, tmp_path / f"{name} again"):
            theirs, loaded = AutoTokenizer.from_pretrained(source), load_tokenizer(source)
            assert theirs.chat_template == loaded.template == ours.template
            for tools in (None, [], [{"type": "function"}]):
                text = theirs.apply_chat_template(said, tools=tools, tokenize=False)
                assert loaded.apply_chat_template(said, tools=tools) == text
                assert loaded.encode_chat(said, tools=tools)[0] == loaded.encode(text)


def test_without_a_default_the_names_are_told(saved, tmp_path):
    listed = [{"name": name, "template": NAMED[name]} for name in ("tool_use", "rag")]
    ours = load_tokenizer(folder(saved, tmp_path / "x", listed))
    said = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(said, tools=[]) == "T[]"
    with pytest.raises(OpenQwenError, match="rag, tool_use"):
        ours.encode_chat(said)


def test_files_left_by_named_templates_do_not_outlive_their_tokenizer(trained, tmp_path):
    Tokenizer(trained.vocabulary, trained.merges, template=NAMED, template_apart=True).save(
        tmp_path
    )
    assert load_tokenizer(tmp_path).template == NAMED
    trained.save(tmp_path)
    assert load_tokenizer(tmp_path).template == trained.template


@pytest.mark.parametrize(
    "template", [7, ["x"], [{"name": "x"}], [{"name": "../x", "template": "x"}], {"a": 1}]
)
def test_templates_that_are_none_are_named(saved, tmp_path, template):
    with pytest.raises(OpenQwenError, match="chat_template is not text"):
        load_tokenizer(folder(saved, tmp_path / "x", template))


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ [][3].x }}", "{{ range(10 ** 9) }}", "{{ eos_token() }}"]
)
def test_any_error_of_a_template_is_told_as_its_own(trained, template):
    with pytest.raises(OpenQwenError, match="template failed"):
        Tokenizer(trained.vocabulary, trained.merges, template=template).encode_chat(
            [{"role": "user", "content": "x"}]
        )
