"""The corpus stage in several processes and on Ray: the bytes of one process, whoever dies."""

import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial

import corpus_deaths
import pytest
from test_corpus_build import build, bytes_of, essay, tasks

from openqwen.corpus import CorpusConfig, work
from openqwen.corpus import build as corpus_build
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl

STEPS = ("reading", "mapping", "applying")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(corpus_build, "_UNIT_BYTES", 8_000)


@pytest.fixture
def raw(tmp_path):
    """Some 40 documents in ten units: with an exact and a near duplicate, and damage."""
    folder = tmp_path / "raw" / "letters"
    folder.mkdir(parents=True)
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(essay(f"letters{index}"))
    (folder / "copy.txt").write_text(essay("letters1").replace(" ", "  "))
    (folder / "near.txt").write_text(essay("letters2") + "\n\nOne more line at the end.\n")
    (folder / "bad.jsonl").write_text("{oops\n")
    return folder.parent


def config(raw, kind="single", count=2):
    return CorpusConfig(folder=raw, engine=kind, workers={"count": count, "cpus": 1})


def test_workers_that_die_in_every_step_change_no_byte(raw, tmp_path, kind, monkeypatch, capsys):
    build(config(raw), tmp_path / "one", tasks())
    for step in STEPS:
        monkeypatch.setattr(corpus_build, step, partial(corpus_deaths.dying, step, tmp_path))
    build(config(raw, kind), tmp_path / "two", tasks())
    assert sorted(path.stem for path in tmp_path.glob("*.died")) == sorted(STEPS)
    assert capsys.readouterr().err.count("a worker died and is replaced") == 3
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_the_number_of_workers_changes_no_byte(raw, tmp_path, kind):
    build(config(raw), tmp_path / "one", tasks())
    for count in (1, 3):
        build(config(raw, kind, count), tmp_path / str(count), tasks())
        assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / str(count))


@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_program_goes_on_and_does_nothing_twice(raw, tmp_path, engine, step):
    """The program that asks the workers is killed; the next one works in another way."""
    if engine == "ray":
        pytest.importorskip("ray")
    build(config(raw), tmp_path / "one", tasks())
    scratch, out = tmp_path / "scratch", tmp_path / "two"
    code = f"""
        from functools import partial
        from pathlib import Path
        import corpus_deaths
        from openqwen.corpus import CorpusConfig, build as stage
        from test_corpus_build import tasks
        place = Path({str(tmp_path)!r})
        stage._UNIT_BYTES = 8_000
        stage.{step} = partial(corpus_deaths.stuck, {step!r}, place)
        config = CorpusConfig(folder=place / "raw", engine={engine!r}, workers={{"count": 2}})
        stage.build_corpus(config, tasks(), place / "two", 0, place / "scratch")
    """
    out.mkdir()
    scratch.mkdir()
    paths = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}  # Ray's workers read that
    words = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(words, stderr=-1, text=True, env=environment)
    while not (tmp_path / f"{step}.stuck").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)  # the other worker does a part or two meanwhile
    process.kill()
    process.communicate(timeout=60)
    time.sleep(1)  # its workers end with it
    done = {path: path.stat().st_mtime_ns for path in scratch.rglob("0*.json")}
    assert done
    build(config(raw), out, tasks(), scratch=scratch)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert bytes_of(tmp_path / "one") == bytes_of(out)
    names = [row["id"] for path in scratch.glob("final/*.jsonl") for row in read_jsonl(path)]
    assert len(names) == len(set(names))


def test_a_machine_that_does_not_see_the_files_is_named(raw, tmp_path):
    """Without this, all documents of that machine would count as unreadable."""
    with pytest.raises(OpenQwenError, match="does not see the folder of the run"):
        work.begin_work(work.mapping, config(raw), tmp_path)
    (tmp_path / "plan.json").touch()
    with pytest.raises(OpenQwenError, match="does not see the folder of the corpus") as caught:
        work.begin_work(work.mapping, config(raw / "elsewhere"), tmp_path)
    assert "share" in caught.value.do


def test_the_flag_of_the_command_line(raw, tmp_path):
    pytest.importorskip("ray")
    found = []
    for name, more in (("alone", []), ("ray", ["--engine", "ray", "--workers.count", "2"])):
        line = [sys.executable, "-m", "openqwen.cli", "corpus", "--folder", "raw", *more]
        line += ["--output", name, "--task-documents", "5", "--heldout-share", "0.1"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr + done.stdout
        found.append(bytes_of(tmp_path / name))
        settings = json.loads((tmp_path / name / "manifest.json").read_text())["config"]
        assert not {"engine", "workers"} & settings.keys()
    assert found[0] == found[1]
