"""Qwen2's and Qwen2.5's templates on thousands of chats: rendered as transformers renders them,
masked as a second construction says, which knows nothing of how the first works."""

import random

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from openqwen.tokenizer import CONTROL_TOKENS, Tokenizer
from openqwen.tokenizer.template import chatml_template

QWEN2_PROMPT = "You are a helpful assistant."
QWEN25_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# The published file of Qwen2's instruct models: an input of this test.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = 1500  # of each template
WORDS = (
    *(
        "Hello",
        " world",
        "naïve",
        "日本語",
        "한국어",
        "😀",
        "👩\u200d🚀",
        "e\u0301",
        "(1, 2)",
        "42",
        "'s",
        "assistant\n",
        "user",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "{{ x }}",
        "{% if %}",
        "{# c #}",
        "\\n",
        "'\"<&>",
        "<tools>",
        "<tool_response>",
    ),
    *(
        "\u2028",
        "\0",
        "<tool_cal",
        "<|im_",
        "system",
        "```py\nx = 1\n```",
        "$\\boxed{7}$",
        "None",
        "true",
    ),
)


def content(rng):
    return "".join(rng.choices(WORDS, k=rng.choice((0, 1, 1, 2, 5, 12))))


def value(rng, depth=0):
    """Anything that JSON holds."""
    kind = rng.randrange(8 if depth < 2 else 5)
    if kind < 5:
        return (content(rng), rng.randrange(-9, 10**9), rng.random(), None, rng.random() < 0.5)[
            kind
        ]
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {content(rng): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def tool(rng):
    function = {
        "name": content(rng),
        "description": content(rng),
        "parameters": {"type": "object", "properties": value(rng)},
    }
    return {"type": "function", "function": function}


def call(rng):
    function = {"name": content(rng), "arguments": rng.choice((value(rng), {"x": value(rng)}))}
    return rng.choice(
        (function, {"type": "function", "function": function}, {"id": "c1", "function": function})
    )


def chat(rng, tools):
    """System messages (empty ones, late ones), turns in any order, runs of tool results, calls
    without text.
    """
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": content(rng)})
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(
            ("user", "user", "assistant", "assistant", "system", *(["tool"] * 2 if tools else []))
        )
        if role == "assistant" and tools and rng.random() < 0.5:
            calls = [call(rng) for _ in range(rng.randrange(1, 3))]
            text = rng.choice((content(rng), "", None))
            messages.append({"role": role, "content": text, "tool_calls": calls})
        elif role == "tool":
            messages += [
                {"role": role, "content": content(rng)} for _ in range(rng.randrange(1, 4))
            ]
        else:
            messages.append({"role": role, "content": content(rng)})
    return messages


def chats(seed, tools=True, count=CHATS):
    """(messages, tools or None, whether an answer is asked for)"""
    rng = random.Random(seed)
    for _ in range(count):
        listed = (
            [tool(rng) for _ in range(rng.randrange(1, 4))]
            if tools and rng.random() < 0.5
            else None
        )
        yield chat(rng, tools), listed, rng.random() < 0.5


def transformers_text(template, messages, tools, prompt):
    """What `apply_chat_template(tokenize=False)` gives."""
    texts, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt
    )
    return texts[0]


@pytest.fixture(scope="module", params=["Qwen2", "Qwen2.5", "Qwen2.5 as we write it"])
def templated(request, trained):
    """(a small tokenizer with one of the templates, whether it knows tools)."""
    if request.param == "Qwen2":
        return Tokenizer(trained.vocabulary, trained.merges, CONTROL_TOKENS[:3], QWEN2), False
    if request.param == "Qwen2.5":
        template = request.getfixturevalue("real").template
    else:
        template = chatml_template(QWEN25_PROMPT)
    return Tokenizer(trained.vocabulary, trained.merges, CONTROL_TOKENS, template), True


def test_thousands_of_chats_render_as_in_transformers(templated):
    tokenizer, tools = templated
    for messages, listed, prompt in chats(1, tools):
        ours = tokenizer.apply_chat_template(messages, tools=listed, add_generation_prompt=prompt)
        assert ours == transformers_text(tokenizer.template, messages, listed, prompt)


def test_the_method_of_transformers_gives_the_same(templated, tmp_path):
    tokenizer, tools = templated
    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for messages, listed, prompt in chats(2, tools, count=150):
        options = {"tools": listed, "add_generation_prompt": prompt}
        theirs = other.apply_chat_template(messages, tokenize=False, **options)
        assert tokenizer.apply_chat_template(messages, **options) == theirs
        ids = other.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert tokenizer.encode_chat(messages, **options)[0] == ids


def test_our_template_is_qwen25s(real):
    """One text for every chat that both accept, so a model trained on ours chats under Qwen2.5's,
    and the reverse.
    """
    ours = Tokenizer(real.vocabulary[:256], [], CONTROL_TOKENS, chatml_template(QWEN25_PROMPT))
    for messages, listed, prompt in chats(3):
        options = {"tools": listed, "add_generation_prompt": prompt}
        assert ours.apply_chat_template(messages, **options) == real.apply_chat_template(
            messages, **options
        )


def answers(tokenizer, messages, tools):
    """(start, end) in the rendered text of what each assistant wrote, by rendering every beginning
    of the chat.
    """
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i], tools) if i else None
            if before is None:  # the default system turn of a chat that begins with an answer
                shown = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools)
                before = shown[: shown.index("<|im_start|>user")]
            after = tokenizer.apply_chat_template(messages[: i + 1], tools)
            yield len(before + "<|im_start|>assistant\n"), len(after) - len("\n")


def test_masks_are_what_a_second_construction_finds(templated, tmp_path):
    """The spans of the text by rendering beginnings of the chat, the tokens in them by
    transformers' offsets.
    """
    tokenizer, tools = templated
    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    marked = 0
    for messages, listed, prompt in chats(4, tools, count=600):
        text = tokenizer.apply_chat_template(messages, listed, add_generation_prompt=prompt)
        encoding = other(text, return_offsets_mapping=True)
        spans = list(answers(tokenizer, messages, listed))
        for start, end in spans:
            assert text[start - len("<|im_start|>assistant\n") : start] == "<|im_start|>assistant\n"
            assert text[:end].endswith("<|im_end|>")
        expected = [
            int(any(first >= start and last <= end for start, end in spans))
            for first, last in encoding["offset_mapping"]
        ]
        ids, mask = tokenizer.encode_chat(messages, add_generation_prompt=prompt, tools=listed)
        assert ids == encoding["input_ids"]
        assert mask == expected
        marked += sum(mask)
    assert marked > 5000


@pytest.mark.parametrize(("name", "prompt"), [("Qwen2", QWEN2_PROMPT), ("Qwen2.5", QWEN25_PROMPT)])
def test_default_system_prompts(trained, request, name, prompt):
    template = QWEN2 if name == "Qwen2" else request.getfixturevalue("real").template
    tokenizer = Tokenizer(trained.vocabulary, trained.merges, template=template)
    user = {"role": "user", "content": "Hi"}
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert (
        tokenizer.apply_chat_template([user]) == f"<|im_start|>system\n{prompt}<|im_end|>\n{turn}"
    )
    empty = [{"role": "system", "content": ""}, user]
    assert tokenizer.apply_chat_template(empty) == f"<|im_start|>system\n<|im_end|>\n{turn}"


def test_a_template_may_mark_what_the_assistant_says(trained):
    """transformers' `generation` block, which some fine-tunes carry, changes nothing in the
    text.
    """
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    )
    tokenizer = Tokenizer(trained.vocabulary, trained.merges, template=template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert (
        tokenizer.apply_chat_template(messages)
        == "a;b;"
        == transformers_text(template, messages, None, False)
    )
