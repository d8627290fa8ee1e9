"""`openqwen synthesize METHOD` on the command line."""

import json

import pytest

from hostile import Hostile
from openqwen.cli import main
from openqwen.recipe.graph import recipe_class, verbs
from openqwen.recipe.settings import find_recipe, load_settings


@pytest.fixture
def server():
    server = Hostile()

    def respond(handler, body):
        text = body["messages"][-1]["content"]
        seed = body.get("seed", 0)
        said = (
            "Verdict: yes"
            if "Verdict" in text
            else f"{seed} + 0 = {seed}, so \\boxed{{{seed % 3}}}"
        )
        if "different tests" in text:
            said = "assert f(1) == 2\nassert f(2) == 3"
        elif "Write a Python function" in text:
            said = f"```python\ndef f(x):\n    return x + {1 + (seed % 4 == 0)}\n```"
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        handler.say(200, {"choices": [choice]})

    server.respond = respond
    yield server
    server.shutdown()
    server.server_close()


def tasks(tmp_path, reference=None):
    path = tmp_path / "tasks.jsonl"
    lines = [{"question": f"What is {n} times one?", "answer": "2"} for n in range(6)]
    if reference:
        lines = [{"question": f"Add {n}.", "reference": reference} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(method, tmp_path, server, **more):
    words = ["synthesize", method, "--tasks", str(more.pop("tasks", tmp_path / "tasks.jsonl"))]
    words += ["--endpoint.url", server.url, "--endpoint.name", "m"]
    words += ["--output", str(tmp_path / "out"), "--seed", "3"]
    return words + [text for pair in more.items() for text in (f"--{pair[0]}", str(pair[1]))]


def test_the_methods_are_listed(capsys):
    for words in (["synthesize"], ["synthesize", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        methods = [name.partition("-")[2] for name in verbs() if name.startswith("synthesize-")]
        assert all(f"  {method} " in text for method in methods)
        assert "rejection" in methods
    assert main(["--help"]) == 0
    assert "  synthesize rejection" in capsys.readouterr().out
    assert main(["synthesize", "rejectoin"]) == 1
    assert "Did you mean 'rejection'?" in capsys.readouterr().err


def test_the_help_of_a_method(capsys):
    with pytest.raises(SystemExit):
        main(["synthesize", "rejection", "--help"])
    text = capsys.readouterr().out
    assert "synthesize rejection" in text
    for flag in ("--tasks", "--samples", "--limits.requests", "--endpoint.url", "--prompts"):
        assert flag in text


def test_a_run_its_reuse_and_its_continuation(tmp_path, server, capsys):
    tasks(tmp_path)
    words = command("rejection", tmp_path, server)
    assert main([*words, "--limits.requests", "9"]) == 1
    error = capsys.readouterr().err
    assert "The limit of 9 requests is reached." in error
    assert "raise --limits.requests" in error
    assert len(server.seen) == 9
    assert main(words) == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["requests"] == len(server.seen)  # none was sent twice
    assert manifest["metrics"]["demonstrations"] > 3
    assert "limits" not in manifest["config"]
    record = json.loads((out / "demonstrations.jsonl").read_text().splitlines()[0])
    assert record["origin"]["model"] == "m"
    assert record["origin"]["seed"] == 3
    asked = len(server.seen)
    assert main([*words, "--limits.concurrency", "2"]) == 0
    assert len(server.seen) == asked  # the artifact is there
    assert not list(tmp_path.glob(".out.work"))


def test_execution_from_the_command_line(tmp_path, server):
    tasks(tmp_path, {"entry": "f", "tests": "assert f(5) == 6"})
    assert main(command("execution", tmp_path, server, solutions=8)) == 0
    report = json.loads((tmp_path / "out" / "synthesis.json").read_text())
    assert report["demonstrations"] >= 1
    assert report["preferences"] >= 1
    assert report["gates"]["right by own tests"]["yield"] == 1


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"tasks": "/no/such.jsonl"}, "The input 'tasks' does not exist"),
        ({"samples": "0"}, "samples is 0"),
        ({"prompts": "/no/such"}, "The input 'prompts' does not exist"),
        ({"limits.requsets": "3"}, "Did you mean '--limits.requests'?"),
        ({"model": "/no/such"}, "A model and a server are named"),
    ],
)
def test_errors(tmp_path, server, capsys, more, what):
    tasks(tmp_path)
    assert main(command("rejection", tmp_path, server, **more)) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rejection-0.5b", "execution-0.5b"])
def test_the_recipes_are_settings_of_single_stages(capsys, name):
    method = name.partition("-")[0]
    recipe = load_settings(find_recipe(name), recipe_class(alone=True))
    settings = getattr(recipe, f"synthesize_{method}")
    assert settings.quantize == "int8"
    assert settings.form in ("gsm8k", "mbpp")
    assert recipe.sft.lora.rank == 16
    assert main(["run", name]) == 1
    error = capsys.readouterr().err
    assert f"does not run the stage of the section 'synthesize_{method}'" in error
    assert f"synthesize {method} --recipe {name}" in error
    with pytest.raises(SystemExit):
        main(["synthesize", method, "--recipe", name, "--help"])
    assert "int8" in capsys.readouterr().out
