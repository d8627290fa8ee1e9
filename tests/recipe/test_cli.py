"""The command itself: verbs, help, exit statuses, a stage alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import openqwen.cli
from openqwen.recipe.graph import load_stage, verbs


def test_overview_without_loading_anything_heavy():
    code = (
        "import sys, openqwen.cli as cli; cli.main(['--help']); print({'torch', 'rich'} & "
        "set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "online-dpo" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_verbs(call):
    assert call() == 0
    assert "  run " in call.out
    assert call("--version") == 0
    assert call.out.startswith("openqwen 0.")
    assert call("leran") == 1
    assert "Did you mean 'learn'?" in call.err
    assert call("run") == 1
    assert call("run", "--dry-run", "tiny.yaml") == 1
    assert "The recipe must be the first argument" in call.err
    assert call("run", "nowhere") == 1
    assert "There is no recipe 'nowhere'" in call.err
    assert call("bench", "train") == 1
    assert "benchmarks/bench_train.py" in call.err
    assert call("report") == 1
    assert call("report", "nowhere") == 1


def test_a_bug_is_told_without_a_traceback(call, monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(openqwen.cli, "_report", broken)
    assert call("report", "x") == 70
    assert "ZeroDivisionError: oops" in call.err
    path = Path(
        next(line for line in call.err.splitlines() if "where:" in line).split(": ", 1)[1].strip()
    )
    assert "Traceback" in path.read_text()
    path.unlink()


def test_a_reader_that_goes_away(call):
    command = f"{sys.executable} -m openqwen.cli --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_stage_alone(call):
    Path("data.jsonl").write_text("{}\n")
    command = ["learn", "--corpus", "data.jsonl", "--output", "out/model", "--train.steps", "5"]
    assert call(*command) == 0
    assert call.ran == ["learn"]
    manifest = json.loads(Path("out/model/manifest.json").read_text())
    assert manifest["config"]["train"]["steps"] == 5
    assert manifest["inputs"]["corpus"]["stage"] == "data.jsonl"
    assert [path.name for path in Path("out").iterdir()] == ["model"]
    assert call(*command) == 0
    assert call.ran == []
    assert "reused" in call.out
    assert call(*command, "--seed", "3") == 1
    assert "holds another artifact: seed 0 -> 3" in call.err
    Path("data.jsonl").write_text("{} \n")
    assert call(*command) == 1
    assert "its input corpus changed" in call.err


def test_a_stage_alone_resumes_after_a_failure(call, monkeypatch):
    Path("data.jsonl").write_text("{}\n")
    command = ["learn", "--corpus", "data.jsonl", "--output", "model"]
    monkeypatch.setenv("FAKE_BUG", "1")
    assert call(*command) == 70
    monkeypatch.delenv("FAKE_BUG")
    assert not Path("model").exists()
    assert call(*command) == 0
    assert "resuming from its saved state" in call.out


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--output", "x"], 2, "--corpus"),
        (["--corpus", "nowhere", "--output", "x"], 1, "'corpus' does not exist"),
        (["--corpus", "tiny.yaml", "--output", "."], 1, "holds something else"),
        (
            ["--corpus", "tiny.yaml", "--output", "x", "--train.stepz", "1"],
            1,
            "Did you mean '--train.steps'",
        ),
        (["--help"], 0, ""),
    ],
)
def test_a_stage_alone_with_bad_input(call, arguments, status, told):
    assert call("learn", *arguments) == status
    assert told in call.err
    assert call.ran == []


def test_the_plan_of_a_real_recipe_has_an_estimate_for_every_stage(tmp_path, capsys):
    assert openqwen.cli.main(["run", "tiny", "--output", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "19 of 19 to make" in printed
    assert printed.count("~") == 20
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_of_the_real_recipe_has_help_with_its_inputs_and_fields_apart(verb, capsys):
    """An input and a field of one name would be one flag."""
    with pytest.raises(SystemExit, match="0"):
        # `evaluate` without a corpus is the verb of benchmarks.
        openqwen.cli.main([verb, *["--corpus", "x"] * (verb == "evaluate"), "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in load_stage(verb).inputs)


@pytest.mark.parametrize("verb", openqwen.cli.RECIPE_VERBS)
def test_every_other_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        openqwen.cli.main([verb, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    bare = {
        "chat": "MODEL",
        "serve": "MODEL",
        "report": "RUN_FOLDER",
        "plan": "RECIPE",
        "run": "RECIPE",
    }
    bare |= {"convert": "SOURCE TARGET", "quantize": "SOURCE TARGET"}
    assert bare.get(verb, "") in " ".join(usage.split())
    assert "--model" not in usage or verb not in ("chat", "serve")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "mine", "--port", "80"],
        ["serve", "--port", "80", "mine"],
        ["serve", "--model", "mine", "--port=80"],
        ["serve", "--port", "80", "--adapters", "a=b", "--model", "mine"],
        ["serve", "--model=mine", "--port", "80"],
    ],
)
def test_the_model_with_and_without_its_flag(arguments, monkeypatch):
    from openqwen.serve import server

    asked = []
    monkeypatch.setattr(server, "serve", lambda model, config: asked.append((model, config.port)))
    assert openqwen.cli.main(arguments) == 0
    assert asked == [("mine", 80)]


def test_a_stage_takes_a_model_from_the_hub(call, monkeypatch, tmp_path):
    import fake_learn

    from openqwen.support import hub

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (tmp_path / "blob").write_text("{}")
    (snapshot / "config.json").symlink_to(tmp_path / "blob")  # as the hub's cache lays it out
    asked, given = [], []
    monkeypatch.setattr(
        hub, "_fetched", lambda name, revision, *_: asked.append((name, revision)) or snapshot
    )
    inputs = {"model": "What to start from.", "data": "What to read."}
    run = lambda run: given.append(dict(run.inputs)) or {}
    monkeypatch.setattr(
        fake_learn, "STAGE", dataclasses.replace(fake_learn.STAGE, inputs=inputs, run=run)
    )
    (Path.cwd() / "own").mkdir()
    (Path.cwd() / "own" / "d.jsonl").write_text("{}")
    arguments = ["learn", "--model", "Qwen/Tiny@main", "--data", "own/d.jsonl", "--output", "made"]
    assert call(*arguments) == 0, call.err
    assert asked == [("Qwen/Tiny", "main")]
    assert given == [{"model": snapshot, "data": Path("own/d.jsonl")}]
    assert call("learn", "--model", "Qwen/Tiny", "--data", "own/no.jsonl", "--output", "other") == 1
    assert "'data' does not exist" in call.err
