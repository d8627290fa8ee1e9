"""Online DPO's reference, its log, and a server that samples for it: new weights, a death, a resume."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_grpo import WORDS
from torch.testing import assert_close

from openqwen.engine import Engine, Output, Sampling
from openqwen.model import ModelConfig, Qwen2, Scorer, initialize, load_model, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.grpo import GrpoConfig, grpo
from openqwen.train.online import ReferenceConfig, move_reference
from openqwen.train.online_dpo import OnlineDpoConfig, divergence, online_dpo, win_rate
from openqwen.train.parallel import ALONE
from openqwen.train.rollouts import RolloutGroup, SamplerConfig, send_weights
from openqwen.train.trainer import EpisodeError, Place

CONFIG = ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    tokenizer = train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))
    for kind, name in ((Qwen2, "model"), (Scorer, "reward")):
        model = kind(CONFIG)
        initialize(model, torch.Generator().manual_seed(1))
        with torch.no_grad():  # answers end, and rewards differ
            model.model.embed_tokens.weight[tokenizer.eos_id].mul_(3.0)
        save_checkpoint(model, tokenizer, folder / name)
    records = [{"prompt": [{"role": "user", "content": f"Say {word}."}]} for word in WORDS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder, tokenizer


def run(start, folder, **fields):
    folder.mkdir(exist_ok=True)
    given = {"steps": 5, "batch": 4, "samples": 4, "max_tokens": 30, "beta": 0.5}
    given |= {"train": {"learning_rate": 1e-2, "warmup_share": 0}, "save": {"seconds": 0}}
    config = OnlineDpoConfig(**given | fields)
    place = Place(folder / "out", folder / "scratch", 3, "online")
    prompts = start[0] / "prompts.jsonl"
    online_dpo(config, start[0] / "model", prompts, start[1], place, start[0] / "reward")
    return [
        json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_episode_is_logged(start, tmp_path):
    log = run(start, tmp_path)
    assert sum(entry["tokens"] > 0 for entry in log) >= 3
    for entry in log:
        assert {"reward", "length", "kl", "entropy", "win_rate", "truncated"} <= entry.keys()
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert log[-1]["kl"] > 1e-4
    assert 0 < log[0]["win_rate"] < 1
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == set(range(5))


def test_the_divergence_is_that_of_the_first_answers(start):
    """Against the sum over whole rows, one at a time."""
    model, reference = load_model(start[0] / "model"), Qwen2(CONFIG)
    initialize(reference, torch.Generator().manual_seed(7))
    outputs = Engine(model, start[1]).generate([[1, 2, 3], [4]], Sampling(max_tokens=5), [1, 2])
    groups = [RolloutGroup(n, [output], [0.0]) for n, output in enumerate(outputs)]
    found = divergence(model, reference, groups, 5, "float32", ALONE)
    kl = entropy = tokens = 0.0
    for output in outputs:
        ids = output.prompt_ids + output.written_ids
        rows = []
        for network in (model, reference):
            scores = Engine(network, start[1]).score(ids)
            rows.append(scores[len(output.prompt_ids) - 1 :])
        for policy, fixed in zip(*map(torch.tensor, rows)):
            kl += float((fixed - policy).exp() - (fixed - policy) - 1)
            entropy -= float(policy)
            tokens += 1
    assert found == pytest.approx({"kl": kl / tokens, "entropy": entropy / tokens}, rel=1e-4)


def test_the_win_rate_counts_ties_half():
    def group(*rewards):
        return RolloutGroup(0, [Output() for _ in rewards], list(rewards))

    groups, baseline = [group(1.0, 0.0), group(2.0, 2.0)], [group(0.5), group(2.0)]
    assert win_rate(groups, baseline) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    nothing = [group(float("nan"))]
    assert win_rate(nothing, nothing) != win_rate(nothing, nothing)


def test_the_reference_follows_as_it_is_set():
    model, reference = Qwen2(CONFIG), Qwen2(CONFIG)
    initialize(model, torch.Generator().manual_seed(1))
    initialize(reference, torch.Generator().manual_seed(2))
    start = [p.detach().clone() for p in reference.parameters()]
    move_reference(ReferenceConfig(), 10, model, reference)
    move_reference(ReferenceConfig(refresh="copy", every=3), 4, model, reference)
    for one, other in zip(start, reference.parameters(), strict=True):
        assert torch.equal(one, other)
    move_reference(ReferenceConfig(refresh="average", decay=0.9), 1, model, reference)
    for one, moved, target in zip(start, reference.parameters(), model.parameters(), strict=True):
        assert_close(moved, 0.9 * one + 0.1 * target)
    move_reference(ReferenceConfig(refresh="copy", every=3), 6, model, reference)
    for moved, target in zip(reference.parameters(), model.parameters(), strict=True):
        assert torch.equal(moved, target)


def test_a_copied_reference_has_no_divergence_after_the_copy(start, tmp_path):
    log = run(start, tmp_path, reference={"refresh": "copy", "every": 2})
    zero = [abs(entry["kl"]) < 1e-6 for entry in log]
    assert zero == [True, False, True, False, True]


class Server(ThreadingHTTPServer):
    """A server with OpenAI's completions, by an engine of ours; it dies before request `dies`."""

    def __init__(self, start, weights=None, dies=10**9):
        super().__init__(("127.0.0.1", 0), Routes)
        self.engine = Engine(load_model(start[0] / "model"), start[1])
        self.lock, self.weights, self.dies, self.loaded, self.asked = (
            threading.Lock(),
            weights,
            dies,
            [],
            0,
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Routes(BaseHTTPRequestHandler):
    """/v1/completions and /update_weights."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            if self.path == "/update_weights":
                server.loaded.append(body["version"])
                new = load_model(server.weights / str(body["version"]))
                server.engine.model.load_state_dict(new.state_dict())
                server.engine.refresh(body["version"])
                return self.reply(200, {})
            server.asked += 1
            if server.asked > server.dies:
                return self.reply(503, {"error": "going down"})
            sampling = Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"])
            (output,) = server.engine.generate([body["prompt"]], sampling, [body["seed"]])
        choice = {"text": output.text, "finish_reason": output.finish_reason}
        choice |= {"token_ids": output.token_ids, "stop_id": output.stop_id}
        choice |= {"logprobs": {"token_logprobs": output.logprobs}}
        choice |= {"token_versions": output.versions, "prompt_token_ids": body["prompt"]}
        return self.reply(200, {"choices": [choice]})

    def reply(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr("openqwen.support.retry._FIRST_WAIT", 0.01)


def policy(start, folder, server, **fields):
    given = {"episodes": 4, "batch": 4, "samples": 4, "max_tokens": 8, "order": "shuffle"}
    given |= {"train": {"learning_rate": 1e-2}, "rewards": {"sources": {"reward": 1.0}}}
    config = GrpoConfig(**given | fields)
    if server:
        sampler = SamplerConfig(url=server.url, weights=server.weights)
        config = config.model_copy(update={"sampler": sampler})
    place = Place(folder / "out", folder / "scratch", 3, "grpo")
    prompts = start[0] / "prompts.jsonl"
    grpo(config, start[0] / "model", prompts, start[1], place, start[0] / "reward")
    return [
        json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_server_gets_the_weights_of_every_episode(start, tmp_path):
    """It then samples what the engine in the process samples, and needs no correction."""
    server = Server(start, tmp_path / "weights")
    theirs = policy(start, tmp_path / "server", server)
    ours = policy(start, tmp_path / "here", None)
    server.shutdown()
    assert server.loaded == [0, 1, 2, 3]
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["3"]  # older ones are removed
    for one, other in zip(theirs, ours, strict=True):
        assert one["importance"] == pytest.approx(1.0, abs=1e-4)
        for name in ("loss", "reward", "length", "kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    lines = (tmp_path / "server" / "out" / "samples.jsonl").read_text().splitlines()
    for sample in map(json.loads, lines):
        assert set(sample["versions"]) <= {sample["step"]}


def test_a_server_with_old_weights_is_corrected_for(start, tmp_path):
    server = Server(start)
    log = policy(start, tmp_path, server)
    server.shutdown()
    assert server.loaded == []
    assert log[0]["importance"] == pytest.approx(1.0, abs=1e-4)
    assert abs(log[-1]["importance"] - 1.0) > 1e-3


def test_a_server_that_dies_in_an_episode_costs_no_finished_one(start, tmp_path):
    whole = policy(start, tmp_path / "whole", None, save={"seconds": 1e9})
    server = Server(start, tmp_path / "weights", dies=2 * 16 + 5)  # in the third episode
    with pytest.raises(EpisodeError, match="503"):
        policy(start, tmp_path / "cut", server, save={"seconds": 1e9})
    server.shutdown()
    assert (tmp_path / "cut" / "scratch" / "state-00000002").is_dir()
    again = Server(start, tmp_path / "weights")
    resumed = policy(start, tmp_path / "cut", again, save={"seconds": 1e9})
    again.shutdown()
    assert again.asked == 2 * 16  # the first two episodes were not sampled again
    assert again.loaded == [2, 3]
    for one, other in zip(resumed, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)


def test_vllm_is_told_to_load_the_folder_that_it_was_started_from(start, tmp_path):
    seen = []

    class Told(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, json.loads(body)))
            self.send_response(200 if len(seen) < 3 else 500)
            self.end_headers()
            self.wfile.write(b"no")

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Told)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path / "served"
    shutil.copytree(start[0] / "model", folder)
    model = Qwen2(CONFIG)
    initialize(model, torch.Generator().manual_seed(9))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    config = SamplerConfig(url=url, weights=folder, server="vllm")
    send_weights(model, start[1], config, 5)
    assert seen == [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})]
    for one, other in zip(load_model(folder).parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Exception, match="did not take the weights of step 6: 500: no"):
        send_weights(model, start[1], config, 6)
    server.shutdown()
