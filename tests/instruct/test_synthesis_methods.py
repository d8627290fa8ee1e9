"""What holds for all methods: their verbs, prompts, and the order of answers."""

import pytest
from method_runs import Marks, make
from scripted import number
from test_synthesis_filters import adapt, speaker
from test_synthesis_problems import reasoning
from test_synthesis_repurpose import STORY, book, constitution, repurpose, scored

from openqwen.cli import main
from openqwen.instruct.synthesize.prompts import SHIPPED, PromptFiles
from openqwen.recipe.graph import load_stage, verbs
from openqwen.tokenizer.messages import demonstration

# --- all methods

METHODS = [
    "instructions",
    "repurpose",
    "constitution",
    "structured",
    "reasoning",
    "adapt",
    "critic",
]


@pytest.mark.parametrize("name", METHODS)
def test_stages_and_prompts(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", name, "--help"])
    assert ended.value.code == 0
    assert "--temperature" in capsys.readouterr().out
    stage = load_stage(f"synthesize-{name}")
    assert stage.help == verbs()[f"synthesize-{name}"]
    prompts = PromptFiles(name)
    names = {path.split(".")[0] for path in prompts.paths}
    assert set(prompts.paths) == {f"{n}.{language}" for n in names for language in ("en", "zh")}
    for path in (SHIPPED / name).iterdir():
        assert path.read_text(encoding="utf-8").count("{#") == 1, "says what its variables are"


def test_the_order_in_which_answers_come_changes_no_byte(tmp_path):
    def same(place, **settings):
        limits = {"concurrency": settings["concurrency"]}
        yield make(place / "r", repurpose(place, book(9), limits=limits), STORY)[3]
        model = scored(comply=9, deviate=1, plain=6, revise=9)
        yield make(place / "c", constitution(place, probes=2, limits=limits), model)[3]
        hashed = Marks(
            ("Write one new problem", "Which? A. 1\nB. 2\nC. 3\nD. 4"),
            ("Check the solution", "Verdict: sound"),
            other=lambda text, seed: f"Thought {seed}. Answer: {'BBC'[number(text, seed) % 3]}",
        )
        yield make(place / "l", reasoning(limits=limits), hashed)[3]
        yield make(place / "a", adapt(place, samples=5, limits=limits), speaker())[3]

    places = [tmp_path / name for name in ("1", "9")]
    for place in places:
        place.mkdir()
    one, nine = (list(same(p, concurrency=int(p.name))) for p in places)
    assert one == nine
    assert all(b"messages" in found["demonstrations.jsonl"] for found in one)


def test_records_can_be_read_for_training(tmp_path):
    d, *_ = make(tmp_path, repurpose(tmp_path, book(20)), STORY)
    assert demonstration(d[0])[0] == d[0]["messages"]
