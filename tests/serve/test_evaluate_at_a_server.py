"""`openqwen evaluate --generator URL`: a server's scores are those of the engine in this process."""

import json

import pytest

import openqwen.cli
from openqwen.support.files import read_jsonl

CHOICES = """
title = "Colours"
licence = "none"
source = "made up"
get = "here"
protocol = "the likeliest"
protocol_source = "made up"

[data]
test = ["colours.jsonl"]

[prompt]
form = "base"
question = "The colour of {{ thing }} is"

[choices]
options = "[' red', ' green', ' deep blue']"
correct = "right"
"""


@pytest.mark.parametrize("flags", [[], ["--temperature", "0.9", "--samples", "3"]])
def test_scores_are_those_of_the_engine(tiny, server, tmp_path, flags):
    questions = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
    colours = [
        {"thing": thing, "right": n} for n, thing in enumerate(("blood", "grass", "the sea"))
    ]
    for name, records in (("gsm8k_test", questions), ("colours", colours)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "colours.toml").write_text(CHOICES)
    rows = []
    for name, more in (("here", []), ("there", ["--generator", f"{server.url}/v1"])):
        words = ["evaluate", str(tiny), "--tasks", f"gsm8k,{tmp_path / 'colours.toml'}", *flags]
        words += ["--data", str(tmp_path), "--max-tokens", "12", "--served-name", "tiny", *more]
        assert openqwen.cli.main([*words, "--output", str(tmp_path / name / "out")]) == 0
        found = [
            list(read_jsonl(tmp_path / name / f"out/answers/{task}.jsonl"))
            for task in ("gsm8k", "colours")
        ]
        rows.append(found)
    assert rows[0][0] == rows[1][0]
    for ours, theirs in zip(rows[0][1], rows[1][1], strict=True):
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)
        assert ours["chosen"] == theirs["chosen"]
