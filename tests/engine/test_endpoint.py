"""A generator behind an HTTP server: what is sent, what is read, and servers that misbehave."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from openai.types import Completion, completion_create_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_params
from pydantic import TypeAdapter

from hostile import completion, cut, drop, endless, raw, slow, status
from openqwen.engine import Endpoint, Sampling, Structure, endpoint, openai_api
from openqwen.engine.seeds import seed_of
from openqwen.model import LongContext
from openqwen.support import retry
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress

USER = [{"role": "user", "content": "Hello"}]
# vLLM's fields, which its clients send as `extra_body`.
EXTRA = {
    *("top_k", "min_p", "repetition_penalty", "return_token_ids"),
    *("stop_token_ids", "ignore_eos", "structured_outputs"),
}


def texts(outputs):
    return [output.text for output in outputs]


# ---- what is sent


FULL = Sampling(
    max_tokens=9,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    seed=3,
    stop_ids=(7,),
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    logit_bias=((5, 1.0), (5, 2.0), (6, -2.0)),
    stop=("END",),
    ignore_eos=True,
    structure=Structure("json_schema", '{"type": "object"}'),
)


@pytest.mark.parametrize("sampling", [Sampling(), FULL, Sampling(max_tokens=None)])
@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], USER])
def test_payloads_are_those_of_the_openai_package(prompt, sampling):
    call = openai_api.answer_call(prompt, sampling, 2**64 - 1, "m")
    body = {name: value for name, value in call.body.items() if name not in EXTRA}
    kind = completion_create_params.CompletionCreateParamsNonStreaming
    if prompt is USER:
        kind = chat_params.CompletionCreateParamsNonStreaming
    read = TypeAdapter(kind).validate_python(json.loads(json.dumps(body)))
    assert set(read) == set(body)


def test_every_field_of_the_sampling_has_its_place(server):
    Endpoint(server.url, "m").generate(["text"], FULL)
    path, body = server.seen[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "m",
        "prompt": "text",
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"5": 3.0, "6": -2.0},
        "stop": ["END"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "structured_outputs": {"json": {"type": "object"}},
        "logprobs": 1,
        "return_token_ids": True,
    }


@pytest.mark.parametrize(
    ("prompt", "options", "name"),
    [
        ("text", {"top_logprobs": 2}, "top_logprobs"),
        ("text", {"prompt_logprobs": 2}, "prompt_logprobs"),
        (USER, {"prompt_logprobs": 0}, "prompt_logprobs"),
        ("text", {"long_context": LongContext()}, "long_context"),
    ],
)
def test_what_the_api_has_no_field_for_is_named(server, prompt, options, name):
    """Before anything is sent."""
    with pytest.raises(OpenQwenError, match=f"{name} cannot be sent") as caught:
        Endpoint(server.url, "m").generate([prompt, prompt], Sampling(**options))
    assert "prompt 0" in str(caught.value)
    assert server.seen == []


def test_seeds_are_derived_as_the_engine_derives_them(server):
    sampling = Sampling(temperature=1.0, seed=11)
    Endpoint(server.url, "m", concurrency=1).generate(["a", "b", "c"], sampling)
    sent = [body["seed"] for _, body in server.seen]
    assert [seed % 2**64 for seed in sent] == [seed_of(11, n) for n in range(3)]
    assert all(-(2**63) <= seed < 2**63 for seed in sent)
    server.seen.clear()
    Endpoint(server.url, "m", concurrency=1).generate(["a", "b"], sampling, seeds=[4, 2**64 - 1])
    assert [body["seed"] for _, body in server.seen] == [4, -1]


def test_messages_are_sent_in_the_api_s_form(server):
    server.respond = lambda handler, _: handler.say(200, {"choices": [chat_choice("hi")]})
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [
        {"from": "human", "value": "Call f."},
        {"role": "assistant", "tool_calls": [call], "train": False},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert texts(Endpoint(server.url, "m").generate([messages])) == ["hi"]
    path, body = server.seen[0]
    assert path == "/v1/chat/completions"
    sent_call = {**call, "function": {"name": "f", "arguments": '{"x": "é"}'}}
    assert body["messages"] == [
        {"role": "user", "content": "Call f."},
        {"role": "assistant", "content": "", "tool_calls": [sent_call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert_typed(body)


def test_tool_calls_without_ids_get_them(server):
    """OpenAI's types require them, and records of other forms do not have them."""
    server.respond = lambda handler, _: handler.say(200, {"choices": [chat_choice("hi")]})
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    result = {"from": "observation", "value": "1"}
    turn = [{"from": "human", "value": "Call f twice."}, call, call, result, result]
    Endpoint(server.url, "m").generate([[*turn, {"from": "gpt", "value": "Done."}, *turn]])
    body = server.seen[0][1]
    assert_typed(body)
    called = [c["id"] for m in body["messages"] for c in m.get("tool_calls", ())]
    assert len(set(called)) == 4
    assert called == [m["tool_call_id"] for m in body["messages"] if m["role"] == "tool"]


def assert_typed(body):
    """Pydantic reads lists of TypedDicts lazily: they are looked at one by one."""
    kind = chat_params.CompletionCreateParamsNonStreaming
    read = TypeAdapter(kind).validate_python({n: body[n] for n in body if n not in EXTRA})
    assert len(list(read["messages"])) == len(body["messages"])
    for message in read["messages"]:
        list(message.get("tool_calls", ()))


def test_fields_that_change_nothing_are_left_out_where_the_server_refuses_them(server, capsys):
    """OpenAI's own servers take no field of vLLM's."""

    def strict(handler, body):
        unknown = sorted({"top_k", "min_p", "repetition_penalty", "return_token_ids"} & body.keys())
        if unknown:
            what = f"Unrecognized request arguments supplied: {', '.join(unknown)}"
            return handler.say(400, {"error": {"message": what}})
        return handler.say(200, completion())

    server.respond = strict
    model = Endpoint(server.url, "m", concurrency=2, retries=0)
    assert texts(model.generate(["a"] * 5)) == ["yes"] * 5
    server.seen.clear()
    assert texts(model.generate(["a"])) == ["yes"]
    assert len(server.seen) == 1
    assert "top_k" in capsys.readouterr().err
    with pytest.raises(OpenQwenError, match="400: Unrecognized request arguments supplied: top_k"):
        model.generate(["a"], Sampling(temperature=1.0, top_k=3))


# ---- what is read


def chat_choice(text, **more):
    message = {"role": "assistant", "content": text}
    return {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None} | more


def test_answers_of_hosted_servers(server):
    """The openai package reads them too, so they are as a server sends them."""
    entry = {"token": "hi", "bytes": [104, 105], "logprob": -0.5, "top_logprobs": []}
    chat = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
    chat["choices"] = [chat_choice("hi", logprobs={"content": [entry], "refusal": None})]
    ChatCompletion.model_validate(chat, strict=True)
    four = {"tokens": ["h", "i"], "token_logprobs": [-1.0, -2.0]}
    four |= {"top_logprobs": None, "text_offset": [0, 1]}
    text = completion("hi", finish_reason="length", logprobs=four)
    Completion.model_validate(text, strict=True)
    server.respond = lambda handler, body: handler.say(200, chat if "messages" in body else text)
    first, second = Endpoint(server.url, "m").generate([USER, [1, 2]])
    assert (first.text, first.logprobs, first.finish_reason) == ("hi", [-0.5], "stop")
    assert first.token_ids == []
    assert (second.text, second.logprobs, second.finish_reason) == ("hi", [-1.0, -2.0], "length")
    assert (first.prompt_ids, second.prompt_ids) == ([], [1, 2])


def test_answers_of_vllm_hold_the_token_that_ended_them(server):
    """vllm-project/vllm#28185."""
    four = {"tokens": ["h", "i", "<|im_end|>"], "token_logprobs": [-1.0, -2.0, -3.0]}
    told = {"token_ids": [5, 6, 9], "prompt_token_ids": [1, 2], "logprobs": four}
    told |= {"stop_reason": None}
    server.script = [
        lambda handler, _: handler.say(200, completion("hi", **told)),
        lambda handler, _: handler.say(200, completion("hi", **told | {"stop_reason": "END"})),
        lambda handler, _: handler.say(200, completion("hi", **told | {"finish_reason": "length"})),
    ]
    ended, stopped, limited = Endpoint(server.url, "m", concurrency=1).generate(["a"] * 3)
    assert (ended.token_ids, ended.logprobs, ended.stop_id) == ([5, 6], [-1.0, -2.0], 9)
    assert ended.written_ids == [5, 6, 9]
    assert ended.prompt_ids == [1, 2]
    for other in (stopped, limited):
        assert (other.token_ids, other.stop_id) == ([5, 6, 9], None)
        assert other.logprobs == [-1.0, -2.0, -3.0]


def test_an_answer_that_a_filter_broke_off_is_an_error_and_not_kept(server, tmp_path):
    filtered = completion("h", finish_reason="content_filter")
    server.script = [lambda handler, _: handler.say(200, filtered)]
    model = Endpoint(server.url, "m", cache=tmp_path)
    assert model.generate(["a"])[0].finish_reason == "error"
    assert model.generate(["a"])[0].finish_reason == "stop"


# ---- servers that misbehave


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (408, 429, 500, 502, 503)),
        status(400, x_should_retry="true"),
        *(drop, cut),
        *(raw(text) for text in (b"<html>busy</html>", b"\xff", b"null", b"{}")),
        raw(b'{"error": {"code": 502}}'),
        raw(b'{"choices": [], "x": NaN}'),
    ],
)
def test_what_may_pass_is_asked_again(server, fault):
    server.script = [fault, fault]
    assert texts(Endpoint(server.url, "m").generate(["a"])) == ["yes"]
    assert len(server.seen) == 3
    server.script = [fault] * 3
    with pytest.raises(OpenQwenError, match=r"\(attempt 2\)") as caught:
        Endpoint(server.url, "m", retries=1).generate(["a"])
    assert f"prompt 0, {server.url}/completions" in str(caught.value)
    assert not str(caught.value).rstrip().endswith("do:")


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 422, 301])
def test_what_will_not_pass_is_told_at_once(server, code):
    server.script = [status(code, "The reason.", Location=f"{server.url}/completions")]
    with pytest.raises(OpenQwenError, match=f"answered {code}: The reason"):
        Endpoint(server.url, "m").generate(["a"])
    assert len(server.seen) == 1


def test_a_server_may_say_not_to_ask_again(server):
    server.script = [status(503, "Never.", x_should_retry="false")]
    with pytest.raises(OpenQwenError, match="503: Never"):
        Endpoint(server.url, "m").generate(["a"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"detail": [{"loc": ["body", "top_p"], "msg": "too large"}]}', "body.top_p: too large"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"error": "busy"}', "busy"),
        (b"plain\n\x1b text", "plain"),
        (b"", "Bad Request"),
        (b"[1, 2]", "[1, 2]"),
        (b"x" * 5000, "x" * 500),
    ],
)
def test_errors_tell_what_the_server_says(server, body, said):
    server.script = [lambda handler, _: handler.say(400, body)]
    with pytest.raises(OpenQwenError) as caught:
        Endpoint(server.url, "m").generate(["a"])
    assert said in str(caught.value)
    assert len(str(caught.value)) < 800
    assert "\x1b" not in str(caught.value)


def waits(monkeypatch):
    seen, sleep = [], asyncio.sleep

    async def shortened(seconds):
        seen.append(seconds)
        await sleep(0)

    monkeypatch.setattr(endpoint.asyncio, "sleep", shortened)
    return seen


def test_waits_grow_and_are_scattered(server, monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.5)
    seen = waits(monkeypatch)
    server.respond = status(500)
    with pytest.raises(OpenQwenError):
        Endpoint(server.url, "m", retries=10).generate(["a"])
    full = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert all(most / 2 <= wait <= most for wait, most in zip(seen, full, strict=True))
    assert len({wait / most for wait, most in zip(seen, full)}) > 1


def test_waits_are_those_that_the_server_asks_for(server, monkeypatch):
    seen = waits(monkeypatch)
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    server.script = [
        status(429, Retry_After="7"),
        status(503, Retry_After=date),
        status(429, retry_after_ms="1500", Retry_After="9"),
        status(429, Retry_After="-5"),
        status(429, Retry_After="nan"),
        status(429, Retry_After="soon"),
    ]
    assert texts(Endpoint(server.url, "m").generate(["a"])) == ["yes"]
    assert [round(wait) for wait in seen[:1] + seen[2:]] == [7, 2, 0, 0, 0]
    assert 95 < seen[1] < 101
    server.script = [status(429, Retry_After="86400")]
    with pytest.raises(OpenQwenError, match="asks to wait 86400 seconds"):
        Endpoint(server.url, "m").generate(["a"])


def test_time_limit_counts_the_whole_response(server):
    server.respond = slow
    with pytest.raises(OpenQwenError, match=r"did not answer within 0\.3 seconds"):
        Endpoint(server.url, "m", timeout=0.3, retries=0).generate(["a"])


def test_a_response_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_LARGEST", 2**20)
    server.respond = endless
    with pytest.raises(OpenQwenError, match="larger than 1 MiB"):
        Endpoint(server.url, "m").generate(["a"])
    assert len(server.seen) == 1


def test_nobody_listens():
    with pytest.raises(OpenQwenError, match=r"connection failed.*attempt 2") as caught:
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1).generate(["a"])
    assert "check that the server runs" in str(caught.value)


@pytest.mark.parametrize(
    "choice",
    [
        {"text": 5, "finish_reason": "stop"},
        {"text": "a"},
        {"message": None, "finish_reason": "stop"},
        {"text": "a", "finish_reason": "stop", "token_ids": ["x"]},
        {"text": "a", "finish_reason": "stop", "logprobs": {"content": [{}]}},
        "text",
    ],
)
def test_answers_of_another_form_are_named(server, choice):
    server.respond = lambda handler, _: handler.say(200, {"choices": [choice]})
    with pytest.raises(OpenQwenError, match="cannot be used: it is no completion"):
        Endpoint(server.url, "m").generate(["a"])


# ---- many at once


def test_order_and_the_limit_on_concurrency(server):
    def respond(handler, body):
        time.sleep(0.02 if body["prompt"] == "0" else 0.005)
        handler.say(200, completion(body["prompt"]))

    server.respond = respond
    prompts = [str(n) for n in range(30)]
    work = Progress("ask", 30, "answers")
    model = Endpoint(server.url, "m", concurrency=4)
    assert texts(model.generate(prompts, progress=work)) == prompts
    assert 1 < server.most_active <= 4
    assert work.done == 30
    assert Endpoint(server.url, "m").generate([]) == []


def held(server):
    """Answers are held back until the test ends; returns when that many requests are in flight."""
    free = threading.Event()

    def respond(handler, body):
        if body["prompt"] == "bad":
            end = time.monotonic() + 10
            while server.active < 4 and time.monotonic() < end:
                time.sleep(0.005)
            return handler.say(400, {"error": "bad"})
        free.wait(20)
        return handler.say(200, completion())

    server.respond = respond
    return free


def test_one_failure_cancels_what_is_in_flight(server):
    free = held(server)
    begun = time.monotonic()
    with pytest.raises(OpenQwenError, match="400: bad") as caught:
        Endpoint(server.url, "m", concurrency=4).generate(["a", "b", "bad", *"cdefgh"])
    assert time.monotonic() - begun < 15
    assert "prompt 2" in str(caught.value)
    assert len(server.seen) == 4
    free.set()


def test_ctrl_c_cancels_what_is_in_flight(server):
    free = held(server)
    code = (
        "import signal\n"
        "from openqwen.engine import Endpoint\n"
        # A suite that a shell runs in the background inherits SIGINT as ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        f"    Endpoint({server.url!r}, 'm', concurrency=4).generate(['a'] * 9)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while server.active < 4:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert len(server.seen) == 4
    free.set()


def test_it_runs_inside_of_an_event_loop(server):
    async def notebook():
        return Endpoint(server.url, "m").generate(["a"])

    assert texts(asyncio.run(notebook())) == ["yes"]
