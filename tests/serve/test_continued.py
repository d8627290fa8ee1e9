"""Answers that go on from what is there: a last message left open, code before and after, a prompt
echoed alone.
"""

import pytest
from test_errors import USER, told
from transformers import AutoTokenizer

BEGUN = [*USER, {"role": "assistant", "content": "Once upon a"}]
OPEN = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.fixture(scope="module")
def theirs(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("content", ["Once upon a", "Once <|im_end|> upon", "\n a \n", "x"])
def test_the_last_message_is_left_open_as_transformers_does(server, theirs, content):
    for messages in (
        [*USER, {"role": "assistant", "content": content}],
        [{"role": "user", "content": content}],
    ):
        text = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        body = {"messages": messages, **OPEN}
        assert server.http.post("/apply-template", json=body).json()["prompt"] == text
        if "<|" not in content:
            ids = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
            assert server.http.post("/tokenize", json=body).json()["tokens"] == ids
        closed = theirs.apply_chat_template(messages, tokenize=False)
        body = {"messages": messages, "add_generation_prompt": False}
        assert server.http.post("/apply-template", json=body).json()["prompt"] == closed


@pytest.mark.parametrize(
    "ending", [OPEN, {"continue_final_message": True}, {"add_generation_prompt": False}], ids=str
)
def test_an_answer_goes_on_from_the_last_message(server, client, theirs, ending):
    prompt = theirs.apply_chat_template(BEGUN, tokenize=False, continue_final_message=True)
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    expected = client.completions.create(prompt=prompt, **options)
    answer = client.chat.completions.create(messages=BEGUN, extra_body=ending, **options)
    assert answer.choices[0].message.content == expected.choices[0].text
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_a_turn_that_is_closed_or_cannot_go_on(server, client, theirs):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    closed = {"add_generation_prompt": False, "continue_final_message": False}
    expected = client.completions.create(
        prompt=theirs.apply_chat_template(BEGUN, tokenize=False), **options
    )
    answer = client.chat.completions.create(messages=BEGUN, extra_body=closed, **options)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    both = {"messages": BEGUN, "add_generation_prompt": True, "continue_final_message": True}
    for path in ("/v1/chat/completions", "/tokenize", "/apply-template"):
        assert told(server.http.post(path, json=both), 400)["param"] == "continue_final_message"


def test_a_middle_is_written_between_prompt_and_suffix(client, theirs):
    before, after = "def add(a, b):\n", "\n    return c<|im_end|>\n"
    ids = [
        theirs.convert_tokens_to_ids(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")
    ]
    plain = [theirs(text, split_special_tokens=True)["input_ids"] for text in (before, after)]
    prompt = [ids[0], *plain[0], ids[1], *plain[1], ids[2]]
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    expected = client.completions.create(prompt=prompt, **options)
    answer = client.completions.create(prompt=before, suffix=after, **options)
    assert answer.choices[0].text == expected.choices[0].text
    assert answer.usage.prompt_tokens == len(prompt)
    both = client.completions.create(prompt=[before, "x"], suffix=after, **options)
    assert both.choices[0].text == expected.choices[0].text
    end = str(theirs.convert_tokens_to_ids("<|file_sep|>"))
    ended = client.completions.create(
        prompt=before, suffix=after, logit_bias={end: 100}, **options
    ).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    empty = client.completions.create(prompt=before, suffix="", **options)
    assert (
        empty.choices[0].text == client.completions.create(prompt=before, **options).choices[0].text
    )


def test_a_suffix_needs_a_tokenizer_that_knows_it(start, tmp_path):
    from pydoc_data.topics import topics

    from serving import save

    from openqwen.model import Qwen2
    from openqwen.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
    from openqwen.tokenizer.control import QWEN2_CONTROL_TOKENS

    made = train_tokenizer([topics["if"]], TokenizerConfig(vocabulary=300))
    older = Tokenizer(made.vocabulary, made.merges, QWEN2_CONTROL_TOKENS)
    server = start(save(Qwen2, tmp_path / "older", older, 0))
    error = told(server.http.post("/v1/completions", json={"prompt": "a", "suffix": "b"}), 400)
    assert error["param"] == "suffix"
    told(
        server.http.post("/v1/completions", json={"prompt": "a", "suffix": "b", "echo": True}), 400
    )


def test_a_prompt_is_echoed_alone(server, client):
    options = {"model": "tiny", "prompt": "The best book", "echo": True, "temperature": 0}
    alone = client.completions.create(max_tokens=0, logprobs=2, **options)
    (choice,) = alone.choices
    more = client.completions.create(max_tokens=3, logprobs=2, **options).choices[0].logprobs
    count = alone.usage.prompt_tokens
    assert (choice.text, choice.finish_reason, alone.usage.completion_tokens) == (
        "The best book",
        "length",
        0,
    )
    assert choice.logprobs.tokens == more.tokens[:count]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        more.token_logprobs[1:count], abs=1e-5
    )
    assert client.completions.create(max_tokens=0, **options).choices[0].text == "The best book"
    chunks = [
        chunk.choices[0]
        for chunk in client.completions.create(max_tokens=0, stream=True, **options)
    ]
    assert "".join(chunk.text for chunk in chunks) == "The best book"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert (
        told(server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 0}), 400)[
            "param"
        ]
        == "max_tokens"
    )


def test_no_log_probabilities_may_be_asked_for_in_so_many_words(client):
    options = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 1,
        "logprobs": False,
        "top_logprobs": 0,
    }
    assert client.chat.completions.create(**options).choices[0].logprobs is None
