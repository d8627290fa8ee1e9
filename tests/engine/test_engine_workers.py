"""Engines in worker processes: the answers of one engine, whoever dies, and the dealing."""

import os
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from openqwen.engine import Engine, EngineConfig, Output, Sampling
from openqwen.engine.workers import EngineHost, EngineSource, EngineWorkers, WorkersLane
from openqwen.model import save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.workers import WorkerCall, WorkerDied, WorkersConfig

TWO = WorkersConfig(count=2, cpus=1)
FREE = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=5)
FIELDS = ("text", "token_ids", "finish_reason", "prompt_ids", "stop_id", "versions")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    for seed in (0, 1):
        save_checkpoint(tiny.model(seed), tiny.tokenizer(), folder / str(seed))
    return folder


@pytest.fixture(scope="module")
def workers(place, kind):
    source = EngineSource(place / "0", config=EngineConfig(max_running=4))
    with EngineWorkers(source, kind, TWO) as made:
        yield made


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert type(one) is Output
        for name in FIELDS:
            assert getattr(one, name) == getattr(other, name), name
        for name in ("logprobs", "drawn_logprobs", "prompt_logprobs"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name


def test_the_answers_are_those_of_one_engine(workers):
    engine = Engine(tiny.model(0), tiny.tokenizer())
    asked = [*tiny.prompts(30), "abc", [1, 2]]
    ticks = []
    bar = SimpleNamespace(advance=ticks.append)
    same(workers.generate(asked, FREE, progress=bar), engine.generate(asked, FREE))
    seeds = list(range(32))
    same(workers.generate(asked, FREE, seeds), engine.generate(asked, FREE, seeds))
    scored = Sampling(max_tokens=1, prompt_logprobs=0)
    same(workers.generate(asked, scored), engine.generate(asked, scored))
    assert workers.longest == engine.longest
    assert workers.generate([]) == []
    assert sum(ticks) == 32


def kill(workers, place):
    """Kill a worker, as the system does when there is no memory."""
    worker = workers.workers._all[place]
    if hasattr(worker, "_pool"):
        (pid,) = worker._pool._processes
        os.kill(pid, 9)
    else:
        worker._ray.kill(worker._actor)


def test_a_killed_worker_is_replaced_and_its_requests_are_asked_again(workers, capsys):
    engine = Engine(tiny.model(0), tiny.tokenizer())
    asked, answers, killed = tiny.prompts(40), {}, 0
    with workers.lane() as lane:
        for n, prompt in enumerate(asked):
            lane.submit(n, prompt, FREE, n)
        while lane.open:
            answers |= dict(lane.wait())
            if killed < 2 and len(answers) > 10 * killed:
                kill(workers, killed)
                killed += 1
    assert killed == 2
    same([answers[n] for n in range(40)], engine.generate(asked, FREE, range(40)))
    assert capsys.readouterr().err.count("a worker died and is replaced") == 2


def test_a_refused_prompt_is_an_answer_of_its_own(workers):
    with workers.lane() as lane:
        lane.submit("long", [1] * 500, FREE, 0)
        lane.submit("good", [1, 2, 3], FREE, 0)
        answers = {}
        while lane.open:
            answers |= dict(lane.wait())
    assert isinstance(answers["long"], OpenQwenError)
    assert isinstance(answers["good"], Output)
    with pytest.raises(OpenQwenError, match="500 tokens"):
        workers.generate([[1, 2], [1] * 500], FREE)
    assert workers.generate([[1, 2]], FREE)[0].finish_reason


def test_a_closed_lane_leaves_the_engines_idle(workers):
    with workers.lane() as lane:
        for n in range(8):
            lane.submit(n, [1, 2, 3], Sampling(max_tokens=100), n)
        lane.wait()
    engine = Engine(tiny.model(0), tiny.tokenizer())
    same(workers.generate([[4, 5]], FREE), engine.generate([[4, 5]], FREE))


def expected(source, asked):
    engine = source.load()
    engine.refresh(source.version)
    outputs = engine.generate(asked, FREE)
    assert {v for output in outputs for v in output.versions} == {source.version}
    return outputs


def test_new_weights_are_loaded_by_all_workers_and_by_replacements(place, workers):
    asked, first = tiny.prompts(6), workers.source
    try:
        workers.source = replace(first, path=place / "1", version=4)
        right = expected(workers.source, asked)
        same(workers.generate(asked, FREE), right)
        kill(workers, 1)
        same(workers.generate(asked, FREE), right)
    finally:
        workers.source = replace(first, version=5)
    same(workers.generate(asked, FREE), expected(workers.source, asked))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_host_takes_new_weights_in_the_form_of_the_old(place, quantize):
    host, asked = EngineHost(), tiny.prompts(5)
    for name, version in (("0", 0), ("1", 1), ("0", 7)):
        source = EngineSource(place / name, quantize, version=version)
        requests, answers = [(n, prompt, FREE, n) for n, prompt in enumerate(asked)], {}
        while len(answers) < 5:
            answers |= dict(host.advance(source, requests))
            requests = []
        engine = source.load()
        engine.refresh(version)
        same([answers[n] for n in range(5)], engine.generate(asked, FREE, range(5)))


def test_a_model_that_is_not_there(tmp_path):
    source = EngineSource(tmp_path / "nowhere")
    with EngineWorkers(source, "processes", TWO) as made, pytest.raises(OpenQwenError) as caught:
        made.generate([[1]])
    assert str(source.path) in str(caught.value)


class Scripted:
    """Workers that answer when they are told to."""

    def __init__(self, count):
        self.calls, self.replaced, self.missing = [[] for _ in range(count)], [], set()

    def __len__(self):
        return len(self.calls)

    def ready(self, place):
        return place not in self.missing

    def wait_for_one(self):
        """There is nothing to wait for."""

    def call(self, place, method, *arguments):
        future = Future()
        call = WorkerCall(place, None, future)
        if method == "advance":
            self.calls[place].append((future, [number for number, *_ in arguments[1]]))
        return call

    def replace(self, call, why):
        self.replaced.append(call.place)

    def answer(self, place, numbers):
        future, _ = self.calls[place].pop(0)
        future.set_result([(number, Output(str(number))) for number in numbers])


def lane_of(count, concurrency, requests, missing=()):
    workers = Scripted(count)
    workers.missing |= set(missing)
    lane = WorkersLane(SimpleNamespace(workers=workers, source=None, concurrency=concurrency))
    for n in range(requests):
        lane.submit(f"tag {n}", [n], FREE, n)
    lane.wait()
    return lane, workers


def sent(workers, place):
    return [number for _, numbers in workers.calls[place] for number in numbers]


def test_requests_are_dealt_evenly_and_neighbours_together():
    _, workers = lane_of(2, 16, 5)
    assert (sent(workers, 0), sent(workers, 1)) == ([0, 1, 2], [3, 4])
    lane, workers = lane_of(2, 32, 100)
    assert (sent(workers, 0), sent(workers, 1)) == (list(range(16)), list(range(16, 32)))
    workers.answer(0, [3])
    assert lane.wait() == [("tag 3", lane_answer(3))]
    assert sent(workers, 0) == []  # a block of two is not free yet
    workers.answer(0, [4, 5])
    lane.wait()
    assert sent(workers, 0) == [32, 33, 34]
    assert lane.open == 97


def test_a_worker_that_has_no_room_yet_holds_nothing_up():
    lane, workers = lane_of(2, 4, 6, missing=[1])
    while lane.open:
        workers.answer(0, workers.calls[0][0][1])
        lane.wait()
    assert sent(workers, 1) == []
    lane, workers = lane_of(2, 4, 6, missing=[1])
    workers.missing.clear()
    lane.wait()
    assert sent(workers, 1) == [2, 3]


def lane_answer(number):
    class Same:
        def __eq__(self, other):
            return other.text == str(number)

    return Same()


def test_a_request_whose_workers_always_die_gets_an_error(monkeypatch):
    monkeypatch.setattr(WorkerCall, "death", property(lambda call: call.future.exception()))
    lane, workers = lane_of(2, 4, 4)
    ended = []
    for _ in range(3):
        for future, _ in workers.calls[0]:
            future.set_exception(WorkerDied("out of memory"))
        workers.calls[0].clear()
        ended += lane.wait()
    assert [tag for tag, _ in ended] == ["tag 1", "tag 0"]
    assert all("3 workers died at the same work" in str(error) for _, error in ended)
    assert workers.replaced == [0, 0, 0]
    assert lane.open == 2
    assert sent(workers, 1) == [2, 3]
