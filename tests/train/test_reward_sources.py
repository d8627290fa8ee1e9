"""Rewards from models, graders, functions and endpoints; and answers that get none."""

import json
import math
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
import torch

from openqwen.engine import Output
from openqwen.engine.score import RewardModel
from openqwen.model import ModelConfig, Scorer, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import grader_models
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.reward_sources import RewardSources, RewardSourcesConfig


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))


@pytest.fixture(scope="module")
def reward(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    scorer = Scorer(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256))
    initialize(scorer, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.mul_(4.0)
    save_checkpoint(scorer, tokenizer, folder)
    return folder, scorer


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))  # where toy_rewards.py is


def record(answer="4", **fields):
    asked = [{"role": "user", "content": "2+2?"}]
    return {"prompt": asked, "grader": "exact", "reference": {"answer": answer}, **fields}


def outputs(*texts):
    return [Output(text=text) for text in texts]


def rewards(folder, tokenizer, records, answers, reward=None, **fields):
    sources = RewardSources(
        RewardSourcesConfig(**fields), tokenizer, folder / "bad.jsonl", reward and reward[0]
    )
    return sources(records, answers)


def bad(folder):
    return [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]


def test_graders_functions_and_models_add_up_with_weights(tokenizer, reward, tmp_path):
    records, answers = [record()] * 3, outputs("4", "e", "5")
    weights = {"grader": 2.0, "toy_rewards:likes_e": 0.5, "reward": 0.1}
    found = rewards(tmp_path, tokenizer, records, answers, reward, sources=weights)
    talks = [
        [*record()["prompt"], {"role": "assistant", "content": output.text}] for output in answers
    ]
    models = RewardModel(reward[1], tokenizer).score(talks)
    expected = [2.0 * g + 0.5 * e + 0.1 * m for g, e, m in zip((1, 0, 0), (0, 1, 0), models)]
    assert found == pytest.approx(expected, abs=1e-5)
    named = {str(reward[0]): 1.0}
    found = rewards(tmp_path, tokenizer, records, answers, sources=named)
    assert found == pytest.approx(models, abs=1e-5)


def test_sources_are_given_as_a_list_or_as_a_mapping():
    url = "http://127.0.0.1/score?a=b"
    listed = RewardSourcesConfig(sources=["grader", "reward=0.5", "m:f=-1e-3", url, f"{url}=2"])
    assert listed.weights == {"grader": 1, "reward": 0.5, "m:f": -1e-3, url: 2.0}
    assert RewardSourcesConfig(sources={"grader": 2, "m:f": 0.1}).weights == {
        "grader": 2,
        "m:f": 0.1,
    }
    assert RewardSourcesConfig().weights == {"grader": 1.0}


def test_a_right_answer_has_more_than_any_wrong_one(tokenizer, reward, tmp_path):
    records, answers = [record()] * 4, outputs("4", "5", "one two", "e")
    weights = {"grader": 1.0, "reward": 1.0}
    found = rewards(
        tmp_path, tokenizer, records, answers, reward, sources=weights, shaping="qwen-math"
    )
    (*models,) = rewards(tmp_path, tokenizer, records, answers, reward, sources={"reward": 1.0})
    sigma = [1 / (1 + math.exp(-0.5 * value)) for value in models]
    right = [1, 0, 0, 0]
    assert found == pytest.approx([s + r - 1 for s, r in zip(sigma, right)])
    assert found[0] > 0 > max(found[1:])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "the reward is nan"),
        ("none", "it returned no number"),
        ("raises", "ValueError: no reward for this"),
        ("hangs", "did not return within"),
        ("exits", "its process ended"),
    ],
)
def test_an_answer_without_a_reward_is_written_down_and_the_others_keep_theirs(
    tokenizer, tmp_path, kind, reason
):
    records = [record(), record(kind=kind, id="it"), record()]
    fields = {"sources": {"toy_rewards:bad": 1.0}, "most_bad": 0.4, "seconds": 1.0}
    found = rewards(tmp_path, tokenizer, records, outputs("a", "b", "c"), **fields)
    assert (found[0], found[2]) == (1.0, 1.0)
    assert math.isnan(found[1])
    (line,) = bad(tmp_path)
    assert (line["answer"], line["record"]["id"]) == ("b", "it")
    assert reason in line["reasons"]["toy_rewards:bad"]
    for stricter in ({"bad": "stop"}, {"most_bad": 0.3}):
        with pytest.raises(OpenQwenError, match="1 of 3 answers have no reward") as caught:
            rewards(tmp_path, tokenizer, records, outputs("a", "b", "c"), **fields | stricter)
        assert "bad.jsonl" in str(caught.value)


def test_a_function_that_gives_too_few_rewards_has_given_none(tokenizer, tmp_path):
    fields = {"sources": {"toy_rewards:too_few": 1.0}, "most_bad": 1.0}
    found = rewards(tmp_path, tokenizer, [record()] * 2, outputs("a", "b"), **fields)
    assert all(map(math.isnan, found))
    assert "it returned 0 rewards, not 1" in bad(tmp_path)[0]["reasons"]["toy_rewards:too_few"]


@pytest.mark.parametrize("name", ["toy_rewards:missing", "no_such_module:reward"])
def test_a_function_that_is_not_there_is_named(tokenizer, tmp_path, name):
    with pytest.raises(OpenQwenError, match=f"The reward {name} cannot be called"):
        rewards(tmp_path, tokenizer, [record()], outputs("a"), sources={name: 1.0})


def test_a_prompt_without_a_grader_is_named(tokenizer, tmp_path):
    bare = {"prompt": "2+2?"}
    with pytest.raises(OpenQwenError, match="names no grader"):
        rewards(tmp_path, tokenizer, [bare], outputs("a"))
    with pytest.raises(OpenQwenError, match="no grader 'exat'"):
        rewards(tmp_path, tokenizer, [record() | {"grader": "exat"}], outputs("a"))
    with pytest.raises(OpenQwenError, match="There is no reward model"):
        rewards(tmp_path, tokenizer, [record()], outputs("a"), sources={"reward": 1.0})


SEEN = []


class Judge(BaseHTTPRequestHandler):
    """Rewards an answer by its length; "b" has none."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append(body)
        texts = [talk[-1]["content"] for talk in body["conversations"]]
        reply = {"rewards": [float(len(text)) for text in texts]}
        if self.path == "/score":
            reply = {"data": [{"score": value} for value in reply["rewards"]]}
        self.send_response(500 if "b" in texts else 200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.parametrize("route", ["/", "/score"])
def test_an_endpoint_gives_rewards(tokenizer, tmp_path, route):
    SEEN.clear()
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}{route}"
    fields = {"sources": {url: 2.0}, "most_bad": 0.5}
    found = rewards(tmp_path, tokenizer, [record()] * 3, outputs("aa", "b", "ccc"), **fields)
    server.shutdown()
    server.server_close()
    assert (found[0], found[2]) == (4.0, 6.0)
    assert math.isnan(found[1])
    assert "500" in bad(tmp_path)[0]["reasons"][url]
    sent = SEEN[0]
    assert sent["conversations"][0][-1] == {"role": "assistant", "content": "aa"}
    assert sent["records"][0]["reference"] == {"answer": "4"}


def test_an_endpoint_that_is_not_there_is_named(tokenizer, tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/score"
    with pytest.raises(OpenQwenError, match="the server does not answer"):
        rewards(tmp_path, tokenizer, [record()], outputs("a"), sources={url: 1.0}, seconds=60)


class Scripted:
    """A judge that rates an answer by the word that it finds in the prompt; "odd" has no rating."""

    ratings: ClassVar = {"good": "Fine. [[9]]", "bad": "Poor. [[1]]", "odd": "I cannot say."}

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling=None, seeds=None, progress=None):
        self.asked += prompts
        texts = [prompt[0]["content"] for prompt in prompts]
        found = [next(w for w in self.ratings if f"answer\n{w}" in text) for text in texts]
        return [Output(text=self.ratings[word], finish_reason="stop") for word in found]


def judged(**reference):
    return record() | {"grader": "judge", "reference": {"rubric": "Be good.", **reference}}


def test_a_judge_is_a_reward_and_an_answer_that_it_does_not_rate_has_none(
    tokenizer, tmp_path, monkeypatch
):
    scripted, loaded = Scripted(), []
    monkeypatch.setattr(
        grader_models, "_engine", lambda path, config: loaded.append(path.name) or scripted
    )
    fields = {"models": {"judge": {"model": str(tmp_path)}}, "most_bad": 0.5}
    sources = RewardSources(RewardSourcesConfig(**fields), tokenizer, tmp_path / "bad.jsonl")
    records = [judged(), judged(), record(), judged(threshold=9)]
    sources.check(records)
    assert loaded == []  # a model is loaded when it is needed
    found = sources(records, outputs("good", "bad", "4", "odd"))
    assert found[:3] == pytest.approx([8 / 9, 0, 1])
    assert math.isnan(found[3])
    assert "gave no rating" in bad(tmp_path)[0]["reasons"]["grader"]
    assert len(scripted.asked) == 3
    sources(records[:1], outputs("bad"))
    assert loaded == [tmp_path.name]


class Chat(BaseHTTPRequestHandler):
    """A server with OpenAI's API that rates every answer 4 of 5."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append(body)
        choice = {"message": {"role": "assistant", "content": "[[4]]"}, "finish_reason": "stop"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def log_message(self, *_):
        """Say nothing."""


def test_a_judge_behind_a_server_is_asked_by_name(tokenizer, tmp_path):
    SEEN.clear()
    server = HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    config = {"url": url, "name": "big", "max_tokens": 33, "temperature": 0.5}
    asked = [judged(model="strict", scale=[1, 5])]
    found = rewards(tmp_path, tokenizer, asked, outputs("x"), models={"strict": config})
    server.shutdown()
    server.server_close()
    assert found == [0.75]
    assert (SEEN[0]["model"], SEEN[0]["temperature"]) == ("big", 0.5)
    assert 33 in (SEEN[0].get("max_tokens"), SEEN[0].get("max_completion_tokens"))


def test_the_grader_reward_asks_the_stages_reward_model(tokenizer, reward, tmp_path):
    records = [record() | {"grader": "reward", "reference": {}}] * 2
    for fields in ({}, {"models": {"judge": {}}}, {"models": {"reward": {"model": reward[0]}}}):
        given = None if "reward" in fields.get("models", {}) else reward
        found = rewards(tmp_path, tokenizer, records, outputs("one", "e"), given, **fields)
        talks = [[*records[0]["prompt"], {"role": "assistant", "content": t}] for t in ("one", "e")]
        scores = RewardModel(reward[1], tokenizer).score(talks)
        assert found == pytest.approx([1 / (1 + math.exp(-s)) for s in scores], abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "models", "words"),
    [
        (judged(), {}, "'judge', and its checkpoint or server is not named"),
        (judged(), {"judge": {"url": "http://127.0.0.1:9/v1"}}, "server is not named"),
        (judged(), {"judge": {"model": "a", "url": "http://x", "name": "b"}}, "and a server"),
        (judged(model="strikt"), {"strict": {"model": "a"}}, "the model 'strikt'.*strict"),
        (record() | {"grader": "reward", "reference": {}}, {}, "needs a reward model"),
    ],
)
def test_a_model_that_is_not_named_is_an_error_before_anything_is_sampled(
    tokenizer, tmp_path, asked, models, words
):
    config = RewardSourcesConfig(models=models) if models else RewardSourcesConfig()
    sources = RewardSources(config, tokenizer, tmp_path / "bad.jsonl")
    with pytest.raises(OpenQwenError, match=words):
        sources.check([record(), asked])
