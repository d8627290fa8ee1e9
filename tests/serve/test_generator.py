"""`Endpoint` against our own server gives what `Engine` gives."""

import pytest

from openqwen.engine import Endpoint, Engine, Sampling, Structure
from openqwen.engine import endpoint as endpoint_file
from openqwen.evaluate import answer_samples
from openqwen.instruct.synthesize.preferences import sample_answers
from openqwen.model import load_model
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task
from openqwen.tokenizer import load_tokenizer

PROMPTS = [
    "The statement",
    [{"role": "user", "content": "Hello, who are you?"}],
    [40, 41, 42, 43],
    "Ünïcode → 字",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|>"}],
]
SAMPLINGS = {
    "greedy": Sampling(max_tokens=20),
    "drawn": Sampling(max_tokens=20, temperature=1.0, seed=3),
    "cut": Sampling(max_tokens=20, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=-5),
    "penalties": Sampling(
        max_tokens=20,
        temperature=1.0,
        seed=2**64 - 1,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias=((65, 2.0), (65, 1.0), (66, -3.0)),
    ),
    "stops": Sampling(
        max_tokens=300,
        temperature=1.5,
        stop=("e",),
        stop_ids=tuple(range(150)),
        ignore_eos=True,
    ),
    "structure": Sampling(
        max_tokens=40,
        temperature=1.0,
        structure=Structure(
            "json_schema",
            '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], '
            '"additionalProperties": false}',
        ),
    ),
    "expression": Sampling(
        max_tokens=40,
        temperature=1.0,
        structure=Structure("regex", "[0-9]{3}-[0-9]{3}"),
    ),
}
FIELDS = ("text", "token_ids", "finish_reason", "prompt_ids", "stop_id", "written_ids")


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(load_model(tiny), load_tokenizer(tiny))


@pytest.fixture(scope="module")
def endpoint(server):
    return Endpoint(f"{server.url}/v1", "tiny")


def assert_same(theirs, ours):
    for one, other in zip(theirs, ours, strict=True):
        for name in FIELDS:
            assert getattr(one, name) == getattr(other, name), name
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_endpoint_answers_as_the_engine_does(engine, endpoint, name):
    expected = engine.generate(PROMPTS, SAMPLINGS[name])
    assert any(output.token_ids for output in expected)
    assert_same(endpoint.generate(PROMPTS, SAMPLINGS[name]), expected)


def test_seeds_of_every_size(engine, endpoint):
    sampling = Sampling(max_tokens=20, temperature=1.0)
    seeds = [0, -1, 2**63, 2**64 - 1, 7]
    expected = engine.generate(PROMPTS, sampling, seeds=seeds)
    assert_same(endpoint.generate(PROMPTS, sampling, seeds=seeds), expected)


def test_log_probabilities_of_the_prompt(engine, endpoint):
    prompts = [prompt for prompt in PROMPTS if not isinstance(prompt[0], dict)]
    sampling = Sampling(max_tokens=5, prompt_logprobs=0)
    expected = engine.generate(prompts, sampling)
    assert all(output.prompt_logprobs for output in expected)
    assert_same(endpoint.generate(prompts, sampling), expected)


def test_an_answer_as_long_as_the_context(engine, endpoint):
    sampling = Sampling(max_tokens=None, temperature=1.0, ignore_eos=True)
    long = "".join(map(chr, range(33, 127))) * 9
    prompts = [[40] * (engine.longest - 50), [{"role": "user", "content": long}]]
    expected = engine.generate(prompts, sampling)
    assert [output.finish_reason for output in expected] == ["length"] * 2
    assert_same(endpoint.generate(prompts, sampling), expected)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([10**6], "vocabulary"),
        ("a" * 9000, "maximum context"),
    ],
)
def test_what_the_server_refuses_is_told(endpoint, prompt, said):
    with pytest.raises(OpenQwenError, match=rf"The server answered 400: .*{said}") as caught:
        endpoint.generate(["good", prompt])
    assert "prompt 1" in str(caught.value)


def test_a_wrong_model_and_a_wrong_key(server, start, tiny):
    with pytest.raises(OpenQwenError, match="404: There is no model 'other'"):
        Endpoint(f"{server.url}/v1", "other").generate(["a"])
    locked = start(tiny, "--api-key", "right")
    with pytest.raises(OpenQwenError, match="401") as caught:
        Endpoint(f"{locked.url}/v1", "tiny", api_key="wrong").generate(["a"])
    assert "OPENAI_API_KEY" in str(caught.value)
    right = Endpoint(f"{locked.url}/v1", "tiny", api_key="right")
    assert right.generate(["a"], Sampling(max_tokens=3))[0].token_ids


def test_more_at_once_than_the_server_takes(start, tiny, monkeypatch):
    """Its queue is full (429) again and again; every prompt is answered all the same."""
    small = start(tiny, "--queue", "2")
    model = Endpoint(f"{small.url}/v1", "tiny", concurrency=12, retries=40)
    monkeypatch.setattr("openqwen.engine.endpoint.retry_after", lambda headers: 0.05)
    outputs = model.generate(["a"] * 12, Sampling(max_tokens=20, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [20] * 12


def test_a_failure_ends_what_runs_at_the_server(server, endpoint, engine, monkeypatch):
    """The first answer cannot be used: the others do not go on to the end of the context."""

    def failing(response):
        raise ValueError("it is not to be used")

    monkeypatch.setattr(endpoint_file, "read_answer", failing)
    before = server.metric("vllm:generation_tokens_total")
    prompts = [[40] * (engine.longest - 2), "b", "c", "d", "e"]
    with pytest.raises(OpenQwenError, match="it is not to be used"):
        endpoint.generate(prompts, Sampling(max_tokens=None, ignore_eos=True))
    assert server.settles("vllm:num_requests_running", 0)
    made = server.metric("vllm:generation_tokens_total") - before
    assert made < 4 * (engine.longest - 100)


def test_rooms_above_take_an_endpoint_as_they_take_the_engine(engine, endpoint):
    assert answer_samples(endpoint, 8) == answer_samples(engine, 8)
    task = Task("greeting", PROMPTS[1], "exact", {"answer": "A model."})
    asked = [[task, task], 2, [0.5, 1.0], 8, 0, "test"]
    for theirs, ours in zip(sample_answers(endpoint, *asked), sample_answers(engine, *asked)):
        assert_same([a.output for a in theirs], [a.output for a in ours])
