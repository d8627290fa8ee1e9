"""/v1/completions and the smaller routes: completions, embeddings, models, tokenize, scores,
health, metrics.
"""

import base64
import math
import struct

import pytest

PROMPT = "The best book is"


def ask(client, **options):
    return client.completions.create(
        **({"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0} | options)
    )


def test_a_completion(client):
    answer = ask(client)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.text
    assert choice.logprobs is None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        6,
        answer.usage.prompt_tokens + 6,
    )


def test_sixteen_tokens_unless_told_otherwise(client):
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 16


def test_a_stream(client):
    whole = ask(client).choices[0].text
    *chunks, usage = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_ids_and_several_prompts(server, client):
    ids = server.http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    text = ask(client).choices[0].text
    assert ask(client, prompt=ids).choices[0].text == text
    many = ask(client, prompt=[ids, ids], n=2)
    assert [(c.index, c.text) for c in many.choices] == [(i, text) for i in range(4)]
    assert many.usage.prompt_tokens == 2 * len(ids)
    mixed = ask(client, prompt=[PROMPT, "Another"])
    assert mixed.choices[0].text == text
    echoed = ask(client, echo=True)
    assert echoed.choices[0].text == PROMPT + text
    assert "".join(c.choices[0].text for c in ask(client, echo=True, stream=True)) == PROMPT + text


def test_every_prompt_draws_its_own_unless_a_seed_is_given(client):
    drawn = {"temperature": 1.5, "max_tokens": 12}
    assert len({choice.text for choice in ask(client, prompt=[PROMPT] * 4, **drawn).choices}) == 4
    alone = ask(client, seed=0, **drawn).choices[0].text
    assert ask(client, prompt=["Another", PROMPT], seed=0, **drawn).choices[1].text == alone


@pytest.mark.parametrize("most", [0, 5])
def test_logprobs(client, most):
    choice = ask(client, logprobs=most).choices[0]
    told = choice.logprobs
    assert (
        len(told.tokens)
        == len(told.token_logprobs)
        == len(told.top_logprobs)
        == len(told.text_offset)
        == 6
    )
    assert all(
        max(1, most - 1) <= len(top) <= most + 1 for top in told.top_logprobs
    )  # tokens may share a text
    assert all(token in top for token, top in zip(told.tokens, told.top_logprobs))
    assert told.text_offset[0] == 0
    assert "".join(told.tokens) == choice.text


def test_which_weights_made_each_token(client):
    choice = ask(client, extra_body={"return_token_ids": True}).choices[0]
    assert choice.token_versions == [0] * 6
    assert len(choice.token_ids) == 6
    streamed = [
        c.choices[0] for c in ask(client, stream=True, extra_body={"return_token_ids": True})
    ]
    assert [i for c in streamed for i in c.token_ids] == choice.token_ids


def test_penalties_biases_and_ends(server, client):
    banned = server.http.post("/tokenize", json={"prompt": ask(client).choices[0].text}).json()[
        "tokens"
    ]
    other = ask(
        client, logit_bias={str(i): -100 for i in banned}, extra_body={"return_token_ids": True}
    ).choices[0]
    assert not set(other.token_ids) & set(banned)
    forced = ask(
        client,
        logit_bias={str(banned[0]): 100},
        max_tokens=4,
        extra_body={"return_token_ids": True},
    ).choices[0]
    assert forced.token_ids == [banned[0]] * 4
    ended = ask(
        client, logit_bias={str(banned[0]): 100}, extra_body={"stop_token_ids": [banned[0]]}
    ).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    many = {
        "presence_penalty": 2.0,
        "frequency_penalty": 2.0,
        "extra_body": {"repetition_penalty": 1.3, "min_p": 0.01},
    }
    assert ask(client, temperature=1, top_p=0.9, **many).choices[0].finish_reason


def test_embeddings(server, client):
    texts = ["one text", "another", "one text"]
    answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in answer.data]
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert all(math.dist(v, [0] * len(v)) == pytest.approx(1, abs=1e-4) for v in vectors)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    raw = server.http.post(
        "/v1/embeddings", json={"input": "one text", "encoding_format": "base64"}
    ).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(vectors[0], abs=1e-5)
    short = client.embeddings.create(model="tiny", input="one text", dimensions=8).data[0].embedding
    assert len(short) == 8
    assert math.dist(short, [0] * 8) == pytest.approx(1, abs=1e-4)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


def test_tokenize_and_back(server):
    text = "unicode 媽 and emoji 🤗<|im_end|>"
    for field in ("prompt", "content"):
        answer = server.http.post("/tokenize", json={field: text}).json()
        assert answer["count"] == len(answer["tokens"])
    assert (
        server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["content"] == text
    )
    pieces = server.http.post("/tokenize", json={"content": text, "with_pieces": True}).json()[
        "tokens"
    ]
    raw = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert raw.decode() == text
    plain = server.http.post("/tokenize", json={"prompt": text, "parse_special": False}).json()
    assert plain["count"] > answer["count"]
    chat = [{"role": "user", "content": "hi"}]
    ids = server.http.post("/tokenize", json={"messages": chat}).json()["tokens"]
    template = server.http.post("/apply-template", json={"messages": chat}).json()["prompt"]
    assert server.http.post("/tokenize", json={"prompt": template}).json()["tokens"] == ids


def test_scores_are_the_reward_models(server, reward):
    from openqwen.engine.score import RewardModel

    talks = [
        [{"role": "user", "content": "a?"}, {"role": "assistant", "content": text}]
        for text in ("yes", "no, never")
    ]
    answer = server.http.post("/score", json={"conversations": talks}).json()
    expected = RewardModel.load(reward).score(talks)
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, abs=1e-4)


def test_health_and_metrics(server, client):
    assert server.http.get("/health").json()["status"] == "ok"
    before = server.metric("vllm:generation_tokens_total")
    ask(client)
    assert server.metric("vllm:generation_tokens_total") == before + 6
    text = server.http.get("/metrics").text
    names = """num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total request_success_total
        prefix_cache_hits_total prefix_cache_queries_total num_preemptions_total time_to_first_token_seconds_count
        inter_token_latency_seconds_count e2e_request_latency_seconds_count request_queue_time_seconds_count"""
    for name in names.split():
        assert f"vllm:{name}{{" in text


def test_an_echoed_prompt_comes_with_its_log_probabilities(client, tokenizer):
    """As lm-eval reads them: sums over the continuation, greedy where each token is the
    likeliest.
    """
    ids = [70, 300, 12, 5, 220, 340, 9]
    choice = ask(client, prompt=ids, echo=True, logprobs=3, max_tokens=4).choices[0]
    told = choice.logprobs
    count = len(ids) + 4
    assert (
        len(told.tokens)
        == len(told.token_logprobs)
        == len(told.top_logprobs)
        == len(told.text_offset)
        == count
    )
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert all(
        value <= max(top.values())
        for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:])
    )
    assert all(
        v == max(t.values())
        for v, t in list(zip(told.token_logprobs, told.top_logprobs))[len(ids) :]
    )
    assert told.text_offset[0] == 0
    continued = ask(client, prompt=ids[:3], logprobs=3, max_tokens=1).choices[0].logprobs
    assert max(told.top_logprobs[3].values()) == pytest.approx(
        max(continued.top_logprobs[0].values()), abs=1e-4
    )
    pieces = [
        c.choices[0].logprobs
        for c in ask(client, prompt=ids, echo=True, logprobs=3, max_tokens=4, stream=True)
    ]
    streamed = [value for piece in pieces if piece for value in piece.token_logprobs]
    assert streamed[1:] == pytest.approx(told.token_logprobs[1:], abs=1e-5)
    both = ask(client, prompt=[ids, ids[:4]], echo=True, logprobs=0, max_tokens=1, n=2).choices
    assert [len(c.logprobs.tokens) for c in both] == [8, 8, 5, 5]
    assert ask(client, prompt=ids, echo=True).choices[0].logprobs is None
    bias = {str(tokenizer.eos_id): 100}
    ended = ask(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, logit_bias=bias).choices[0]
    assert len(ended.logprobs.tokens) == len(ids) + 1
    assert sum(ended.logprobs.token_logprobs[3:-1]) == pytest.approx(
        sum(told.token_logprobs[3 : len(ids)]), abs=1e-4
    )
