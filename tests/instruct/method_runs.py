"""What the tests of the methods share: scripted answers, and a run of one method."""

import json

from scripted import Scripted, records, run

from openqwen.engine import Output

ENDLESS = Output("and so on and on", finish_reason="length")
BAD = ["", " \n", "{", "nonsense " * 200, ENDLESS]


class Marks:
    """Answers by the first mark that occurs in the prompt; an answer may be a function."""

    def __init__(self, *rules, other="I see."):
        self.rules, self.other = rules, other

    def __call__(self, text, seed):
        for mark, said in self.rules:
            if mark in text:
                return said(text, seed) if callable(said) else said
        return self.other(text, seed) if callable(self.other) else self.other


def make(place, method, model, config=None):
    place.mkdir(exist_ok=True)
    _, found = run(place / "run", Scripted(model), config or method.config, method)
    report = json.loads(found["synthesis.json"])
    gates = {name: (one["passed"], one["of"]) for name, one in report["gates"].items()}
    return records(found, "demonstrations"), records(found, "preferences"), gates, found


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
