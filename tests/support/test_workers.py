"""Worker processes: order, bounds, deaths, errors, and their end; on this machine and by Ray."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import chunk_work as work
import pytest

from openqwen.support.errors import OpenQwenError
from openqwen.support.workers import Workers, WorkersConfig, map_in_order, sizes

ONE, TWO = WorkersConfig(count=1), WorkersConfig(count=2)


def test_results_come_in_order_whoever_made_them(tmp_path, kind):
    expected = list(map_in_order(partial(work.doubling, tmp_path), range(40)))
    assert expected == [2 * n for n in range(40)]
    (here,) = work.pids(tmp_path)
    found = list(map_in_order(partial(work.doubling, tmp_path), range(40), kind, TWO))
    assert found == expected
    assert len(work.pids(tmp_path)) == 3
    assert here == os.getpid()


@pytest.mark.parametrize("ahead", [1, 3])
def test_few_items_are_read_ahead(tmp_path, ahead):
    read = []

    def items():
        for n in range(30):
            read.append(n)
            yield n

    most = 0
    for place, _ in enumerate(
        map_in_order(partial(work.doubling, tmp_path), items(), "processes", TWO, ahead)
    ):
        most = max(most, len(read) - place)
    assert 2 * ahead - 1 <= most <= 2 * ahead


def test_what_a_killed_worker_was_asked_is_asked_again(tmp_path, kind, capsys):
    found = list(map_in_order(partial(work.dying, tmp_path, 2), range(12), kind, TWO))
    assert found == [2 * n for n in range(12)]
    assert len(work.pids(tmp_path)) >= 3  # a late one may find nothing left
    assert capsys.readouterr().err.count("a worker died and is replaced") == 2


def test_work_that_always_kills_its_worker_is_named(tmp_path, kind):
    results = map_in_order(partial(work.dying, tmp_path, 99), range(12), kind, TWO)
    with pytest.raises(OpenQwenError, match="3 workers died at the same work") as caught:
        list(results)
    # On Ray an item beside it at the same worker may hear of the third death first.
    named = {f"item {n}" for n in (range(2, 10) if kind == "ray" else [5])}
    assert caught.value.where in named
    assert len(list(tmp_path.glob("*.death"))) == 3
    gone(tmp_path)


def test_errors_come_in_their_items_turn(tmp_path, kind):
    results = map_in_order(partial(work.faulty, tmp_path), range(9), kind, TWO)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(OpenQwenError) as caught:
        next(results)
    error = caught.value
    assert type(error) is OpenQwenError
    assert (error.what, error.where, error.do) == ("Five is too many.", tmp_path, "give four")
    with pytest.raises(ValueError, match="six"):
        list(map_in_order(partial(work.faulty, tmp_path), [6], kind, ONE))
    with pytest.raises(OpenQwenError, match="nothing to work with"):
        list(map_in_order(work.unmade, [6], kind, ONE))


def test_a_worker_that_has_no_room_yet_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "ready", lambda self, place: place == 1)
    found = list(map_in_order(partial(work.doubling, tmp_path), range(9), "processes", TWO))
    assert found == [2 * n for n in range(9)]
    assert len(work.pids(tmp_path)) == 1
    found = map_in_order(partial(work.dying, tmp_path, 1), range(9), "processes", TWO)
    assert list(found) == [2 * n for n in range(9)]


def gone(folder: Path) -> None:
    """Wait until the workers that left their files have ended."""
    end = time.monotonic() + 30
    while any(map(work.alive, work.pids(folder))):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_who_stops_early_ends_the_workers(tmp_path, kind):
    for _ in map_in_order(partial(work.doubling, tmp_path), range(10**9), kind, TWO):
        break
    assert work.pids(tmp_path)
    gone(tmp_path)
    with Workers(partial(work.stuck, tmp_path / "stuck"), kind, ONE) as workers:
        (tmp_path / "stuck").mkdir()
        workers.call(0, "__call__")
        while not work.pids(tmp_path / "stuck"):
            time.sleep(0.05)
    gone(tmp_path / "stuck")


@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_program_takes_its_workers_with_it(tmp_path, kind, name):
    if kind == "ray":
        pytest.importorskip("ray")
    code = f"""
        import signal
        from functools import partial
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import chunk_work
        from openqwen.support.workers import WorkersConfig, map_in_order
        make = partial(chunk_work.stuck, Path({str(tmp_path)!r}))
        list(map_in_order(make, [1, 2, 3], {kind!r}, WorkersConfig(count=2)))
    """
    paths = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=-1,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},  # Ray's workers read that
    )
    while len(work.pids(tmp_path)) < 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)
    gone(tmp_path)


def test_workers_have_their_threads_and_the_program_keeps_its_own(monkeypatch, kind):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    config = WorkersConfig(count=1, cpus=2)
    assert list(map_in_order(work.threads, [0], kind, config)) == ["2"]
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("given", "machines", "engines", "made"),
    [
        ({}, [(4, 0)], False, (4, 1, 0)),
        ({}, [(4, 0), (2, 0)], False, (6, 1, 0)),
        ({}, [(4, 0), (2, 0)], True, (2, 2, 0)),
        ({}, [(16, 8), (4, 0)], True, (8, 2, 1)),
        ({}, [(16, 8), (4, 0)], False, (20, 1, 0)),
        ({"gpus": 2}, [(16, 8)], True, (4, 4, 2)),
        ({"gpus": 0.5}, [(16, 1)], True, (2, 8, 0.5)),
        ({"count": 3}, [(8, 0), (4, 0)], True, (3, 4, 0)),
        ({"count": 1, "cpus": 2}, [(8, 0)], True, (1, 2, 0)),
        ({"count": 3, "cpus": 8}, [(8, 0), (8, 0)], True, None),
        ({"count": 2, "gpus": 1}, [(8, 1)], True, None),
        ({"count": 2}, [(1, 0)], False, None),
    ],
)
def test_sizes(given, machines, engines, made):
    config = WorkersConfig(**given)
    resources = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    if made is None:
        with pytest.raises(OpenQwenError, match="no room for"):
            sizes(config, resources, engines)
    else:
        assert sizes(config, resources, engines) == made


def test_ray_is_missing_or_not_reached(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OpenQwenError, match="Ray is not installed") as caught:
        next(map_in_order(work.unmade, [1], "ray"))
    assert "openqwen[ray]" in caught.value.do


def test_a_cluster_that_is_not_there():
    pytest.importorskip("ray")
    code = """
        from openqwen.support.workers import WorkersConfig, map_in_order
        next(map_in_order(int, [1], "ray", WorkersConfig(address="127.0.0.1:1")))
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "OpenQwenError: Ray is not reached" in done.stderr
