"""Every form of conversation gives the messages, tools and text of OpenAI's and transformers'."""

import json

import pytest

from openqwen.serve.protocol import plain
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.messages import (
    as_messages,
    as_tools,
    demonstration,
    is_learned,
    preference,
    prompt,
)

FUNCTION = {
    "name": "multiply",
    "description": "multiplies",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 1.5}}}
TEXT_CALL = {
    "type": "function",
    "function": {"name": "multiply", "arguments": '{"a": 2, "b": 1.5}'},
}
TOOL_CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4"},
]
ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
BARE = json.dumps(CALL["function"])


def turns(call, role="role", content="content", names=("user", "tool", "assistant")):
    user, tool, assistant = names
    said = [(user, "2+2?"), call, (tool, "4"), (assistant, "4")]
    return [turn if isinstance(turn, dict) else {role: turn[0], content: turn[1]} for turn in said]


SHAREGPT = ("from", "value", ("human", "observation", "gpt"))
TOOL_RECORDS = {
    "openai": {"messages": TOOL_CHAT, "tools": TOOLS},
    "text arguments": {
        "messages": turns({"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]}),
        "tools": TOOLS,
    },
    "text tools": {"messages": TOOL_CHAT, "tools": json.dumps(TOOLS)},
    "text everything": {"messages": json.dumps(TOOL_CHAT), "tools": json.dumps(TOOLS)},
    "each tool a text": {"messages": TOOL_CHAT, "tools": [json.dumps(TOOLS[0])]},
    "one tool": {"messages": TOOL_CHAT, "tools": TOOLS[0]},
    "text calls": {
        "messages": turns({"role": "assistant", "tool_calls": json.dumps([TEXT_CALL])}),
        "tools": TOOLS,
    },
    "bare call": {
        "messages": turns({"role": "assistant", "tool_calls": [CALL["function"]]}),
        "tools": TOOLS,
    },
    "openai's old form": {
        "messages": turns(
            {"role": "assistant", "content": None, "function_call": TEXT_CALL["function"]},
            names=("user", "function", "assistant"),
        ),
        "functions": [FUNCTION],
    },
    "llama-factory": {
        "conversations": turns({"from": "function_call", "value": BARE}, *SHAREGPT),
        "tools": json.dumps([FUNCTION]),
    },
    "ms-swift": {
        "messages": turns(
            {"role": "tool_call", "content": BARE}, names=("user", "tool_response", "assistant")
        ),
        "tools": json.dumps(TOOLS),
    },
    "nulls": {
        "messages": [{"name": None, "tool_calls": None, **m} for m in TOOL_CHAT],
        "conversations": None,
        "tools": TOOLS,
        "system": None,
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
            *TOOL_CHAT[1:],
        ],
        "tools": TOOLS,
    },
}


@pytest.mark.parametrize("record", TOOL_RECORDS.values(), ids=TOOL_RECORDS)
def test_every_spelling_of_tools_and_calls_is_one_conversation(record):
    messages, tools = demonstration(record)
    assert (messages, tools) == (TOOL_CHAT, TOOLS)
    assert demonstration({"messages": messages, "tools": tools}) == (messages, tools)


@pytest.mark.parametrize("none", [None, [], {}, "", "[]", "null", "{}"])
def test_no_tools_are_none(none):
    assert demonstration({"messages": TOOL_CHAT, "tools": none}) == (TOOL_CHAT, None)


def test_the_spellings_render_as_transformers_renders_the_first(trained, saved):
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(saved)
    wanted = peer.apply_chat_template(TOOL_CHAT, tools=TOOLS, tokenize=False)
    for record in TOOL_RECORDS.values():
        messages, tools = demonstration(record)
        assert trained.apply_chat_template(messages, tools) == wanted
    asked = turns({"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]})
    assert trained.apply_chat_template(plain(asked), TOOLS) == wanted


def test_consecutive_calls_are_one_turn():
    calls = [{"role": "tool_call", "content": BARE}] * 2
    messages = as_messages([ASKED, *calls, {"role": "tool_response", "content": "4"}])
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"] == [CALL, CALL]
    assert (
        as_messages({"from": "function_call", "value": json.dumps([CALL["function"]] * 2)})[0]
        == messages[1]
    )


@pytest.mark.parametrize(
    "broken", ['{"a": 2', "{", "two", '{"a": NaN}', "[" * 5000, "1" * 5000, '["\\ud800"]', "\x00"]
)
def test_arguments_that_are_no_json_stay_text(trained, broken):
    asked = [
        ASKED,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": broken}}]},
    ]
    for messages in (as_messages(asked), plain(asked)):
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == broken
        assert json.dumps(broken, ensure_ascii=False) in trained.apply_chat_template(messages)


@pytest.mark.parametrize("empty", ["", " ", "{}", None, {}])
def test_no_arguments_are_an_empty_object(empty):
    call = as_messages(
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": empty}}]}]
    )
    assert call[0]["tool_calls"][0]["function"]["arguments"] == {}


PLAIN_RECORDS = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    },
    "ms-swift's sharegpt": {"conversation": [{"human": "2+2?", "assistant": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "query": {"query": "2+2?", "response": "4"},
    "gsm8k": {"question": "2+2?", "answer": "4"},
    "trl, texts": {"prompt": "2+2?", "completion": "4"},
    "ultrachat": {"prompt": "2+2?", "prompt_id": "7", "messages": [ASKED, ANSWERED]},
}


@pytest.mark.parametrize("record", PLAIN_RECORDS.values(), ids=PLAIN_RECORDS)
def test_every_form_of_a_demonstration(record):
    assert demonstration(record) == ([ASKED, ANSWERED], None)
    assert prompt(record) == ([ASKED], None)
    system = {"role": "system", "content": "Be short."}
    assert demonstration(record | {"system": "Be short."})[0] == [system, ASKED, ANSWERED]


def test_alpaca_with_input_and_history():
    record = {
        "instruction": "Add.",
        "input": "2 2",
        "output": "4",
        "history": [["Hi", "Hello"]],
        "tools": "[]",
    }
    messages, tools = demonstration(record)
    assert [m["content"] for m in messages] == ["Hi", "Hello", "Add.\n2 2", "4"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert tools is None


def test_of_a_prompt_with_a_completion_only_the_completion_is_learned():
    messages, _ = demonstration(
        {"prompt": [ASKED, WRONG, {"role": "user", "content": "no"}], "completion": [ANSWERED]}
    )
    assert [is_learned(m) for m in messages if m["role"] == "assistant"] == [False, True]


SYSTEM = {"role": "system", "content": "Be short."}
PREFERENCES = {
    "explicit": {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WRONG]},
    "explicit texts": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "explicit, single messages": {"prompt": [ASKED], "chosen": ANSWERED, "rejected": WRONG},
    "implicit": {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]},
    "ultrafeedback": {
        "prompt": "2+2?",
        "chosen": [ASKED, ANSWERED],
        "rejected": [ASKED, WRONG],
        "messages": [ASKED],
    },
    "prompt twice": {"prompt": [ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WRONG]},
    "llama-factory": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "llama-factory's alpaca": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    "ms-swift": {"messages": [ASKED, ANSWERED], "rejected_response": "5"},
    "ms-swift, messages": {"messages": [ASKED, ANSWERED], "rejected_messages": [ASKED, WRONG]},
}


@pytest.mark.parametrize("record", PREFERENCES.values(), ids=PREFERENCES)
def test_every_form_of_a_preference(record):
    assert preference(record) == ([ASKED], ANSWERED, WRONG, None)
    with_tools = preference(record | {"tools": json.dumps(TOOLS), "system": "Be short."})
    assert with_tools == ([SYSTEM, ASKED], ANSWERED, WRONG, TOOLS)


def test_implicit_prompts_are_those_of_trl():
    """The values that TRL's documentation of `extract_prompt` gives."""
    found = preference({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert found[0] == [{"role": "user", "content": "The sky is"}]
    assert [found.chosen["content"], found.rejected["content"]] == [" blue.", " green."]
    same = preference({"chosen": [SYSTEM, ASKED, ANSWERED], "rejected": [SYSTEM, ASKED, ANSWERED]})
    assert same == ([SYSTEM, ASKED], ANSWERED, ANSWERED, None)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": [ASKED], "chosen": None, "rejected": [WRONG]}, "'chosen' is null"),
        ({"prompt": [ASKED], "chosen": [ANSWERED]}, "lacks 'rejected'"),
        ({"prompt": [ASKED], "chosen": ["4"], "rejected": ["5"]}, r"chosen\[0\]"),
        ({"prompt": [ASKED], "chosen": [], "rejected": []}, "one assistant message(.|\n)*chosen"),
        ({"prompt": [ASKED], "chosen": 4, "rejected": "5"}, "a number(.|\n)*chosen"),
        (
            {"prompt": [ASKED], "chosen": {"4": 4}, "rejected": "5"},
            r"needs a role(.|\n)*chosen\[0\]",
        ),
        ({"prompt": 4, "chosen": "4", "rejected": "5"}, "a number(.|\n)*prompt"),
        (
            {"prompt": [ASKED], "chosen": [ANSWERED, WRONG], "rejected": [WRONG]},
            "one assistant message",
        ),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [ASKED]}, "do not begin alike"),
        ({"chosen": [ANSWERED], "rejected": [WRONG]}, "lacks 'prompt'"),
        ({"chosen": "4", "rejected": "5"}, "lacks 'prompt'"),
        ({}, "lacks 'chosen'; it is empty"),
    ],
)
def test_what_is_no_preference_is_said(record, told):
    with pytest.raises(OpenQwenError, match=told):
        preference(record)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": "x"}, "no conversation; its fields are text"),
        ({"messages": "Hi"}, "not JSON(.|\n)*messages"),
        ({"messages": '"Hi"'}, "a text(.|\n)*messages"),
        ({"messages": 4}, "a number(.|\n)*messages"),
        ({"messages": [None]}, r"this is null(.|\n)*messages\[0\]"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"needs a role(.|\n)*messages\[0\]"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            r"must be text(.|\n)*messages\[1\]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"text, not image_url(.|\n)*\.content\[0\]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            r"name of a function(.|\n)*tool_calls\[0\]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": 4}]},
            r"name of a function(.|\n)*tool_calls\[0\]",
        ),
        (
            {"messages": [{"from": "function_call", "value": "f(2)"}]},
            r"not JSON(.|\n)*messages\[0\]",
        ),
        ({"messages": [ASKED], "tools": "none"}, "not JSON(.|\n)*tools"),
        ({"messages": [ASKED], "tools": [4]}, r"name of a function(.|\n)*tools\[0\]"),
        ({"messages": [ASKED], "tools": [{"function": 4}]}, r"name of a function(.|\n)*tools\[0\]"),
        ({"instruction": "x", "output": "y", "history": ["x"]}, r"history\[0\]"),
        ({"instruction": "x", "output": "y", "history": 4}, "history"),
        ({"instruction": ["x"], "input": "y", "output": "z"}, "instruction"),
    ],
)
def test_what_is_no_demonstration_is_said(record, told):
    with pytest.raises(OpenQwenError, match=told):
        demonstration(record)


def test_marks_of_what_is_not_learned():
    for mark in ("weight", "loss", "train", "loss_scale"):
        assert [is_learned({mark: value}) for value in (0, False, 0.0, 1, True, None)] == [
            False
        ] * 3 + [True] * 3
        with pytest.raises(OpenQwenError, match=mark):
            is_learned({mark: 0.5})
    assert as_tools({"tools": ""}) is None
