"""The checkpoint's generation_config.json as the defaults of requests: zero is a number."""

import pytest

from openqwen.serve.protocol import ChatRequest

MESSAGES = [{"role": "user", "content": "x"}]


def sampling(defaults, **asked):
    return ChatRequest(messages=MESSAGES, **asked).sampling(defaults, 5, 0)


@pytest.mark.parametrize(
    ("defaults", "asked", "temperature"),
    [
        ({"temperature": 0.0}, {}, 0.0),
        ({"temperature": 0}, {"temperature": 0.5}, 0.5),
        ({"temperature": 0.7}, {"temperature": 0.0}, 0.0),
        ({"temperature": None}, {}, 1.0),
        ({}, {}, 1.0),
        ({"temperature": 0.7, "do_sample": False}, {}, 0.0),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0.4}, 0.4),
        ({"temperature": 0.7, "do_sample": None}, {}, 0.7),
        ({"temperature": 0.0, "do_sample": True}, {}, 0.0),
    ],
)
def test_temperature(defaults, asked, temperature):
    assert sampling(defaults, **asked).temperature == temperature


@pytest.mark.parametrize(
    ("name", "plain", "stated", "zero"),
    [
        ("top_p", 1.0, 0.8, 0.0),
        ("min_p", 0.0, 0.1, 0.0),
        ("top_k", 0, 20, 0),
        ("presence_penalty", 0.0, 1.5, 0.0),
    ],
)
def test_a_zero_counts_in_the_file_and_in_the_request(name, plain, stated, zero):
    for defaults, asked, expected in (
        ({}, None, plain),
        ({name: None}, None, plain),
        ({name: stated}, None, stated),
        ({name: zero}, None, zero),
        ({name: stated}, plain, plain),
        ({name: zero}, stated, stated),
    ):
        assert getattr(sampling(defaults, **{name: asked}), name) == expected


def test_repetition_penalty_of_the_file():
    assert sampling({"repetition_penalty": 1.05}).repetition_penalty == 1.05
    assert sampling({"repetition_penalty": 1.05}, repetition_penalty=1.0).repetition_penalty == 1.0
