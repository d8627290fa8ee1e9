"""Reuse, reruns, damage, forcing, planning: what the runner does with three fake stages."""

import json
import os
import pickle
from pathlib import Path

import pytest

from openqwen.recipe import artifact
from openqwen.recipe.graph import nodes_of, recipe_class

ALL = ["corpus", "learn", "online-score"]
RUN = Path("runs/tiny")


def manifests() -> dict[str, dict]:
    return {name: json.loads((RUN / name / "manifest.json").read_text()) for name in ALL}


def snapshot() -> dict[str, tuple]:
    """Every file under the run folder, with its size and time of change; but what every run
    writes.
    """
    paths = [
        path for path in RUN.rglob("*") if path.name not in (".lock", "run.json", "report.html")
    ]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def test_first_run_makes_all_and_tells_results(call):
    assert call("run", "tiny.yaml") == 0
    assert call.ran == ALL
    assert "2/3  learn" in call.out
    assert "loss 0.1235" in call.out
    assert "openqwen chat runs/tiny/learn" in call.out
    made = manifests()
    assert made["learn"]["inputs"] == {
        "corpus": {"stage": "corpus", "digest": made["corpus"]["digest"]}
    }
    assert made["corpus"]["files"]["sub/text.txt"]["bytes"] == 500
    assert made["learn"]["seed"] == 1
    assert made["online-score"]["metrics"] == {"bits_per_byte": None}
    assert made["online-score"]["kind"] == "online-score"
    assert os.readlink(RUN / "learn").startswith(".store/learn-" + made["learn"]["key"][:12])
    assert list((RUN / ".work").iterdir()) == []


def test_second_run_reuses_and_says_so(call):
    call("run", "tiny.yaml")
    before = snapshot()
    assert call("run", "tiny.yaml") == 0
    assert call.ran == []
    assert call.out.count("reused (made 20") == 3
    assert snapshot() == before


def test_one_field_reruns_that_stage_and_later_ones_and_back_reuses(call):
    call("run", "tiny.yaml")
    first = manifests()
    assert call("run", "tiny.yaml", "--learn.train.learning-rate", "2e-3") == 0
    assert call.ran == ["learn", "online-score"]
    assert "train.learning_rate 0.001 -> 0.002" in call.out
    assert "its input learn changed" in call.out
    assert call("run", "tiny.yaml") == 0
    assert call.ran == []
    assert manifests() == first


def test_seed_reruns_everything(call):
    call("run", "tiny.yaml")
    call("run", "tiny.yaml", "--seed", "2")
    assert call.ran == ALL
    assert "seed 1 -> 2" in call.out


def test_identical_rebuild_upstream_reruns_nothing_downstream(call):
    """A new field value that leaves the bytes as they were: later stages depend on content, not on
    history.
    """
    call("run", "tiny.yaml")
    call("run", "tiny.yaml", "--corpus.weights.prose", "0.5")
    assert call.ran == ["corpus"]


def test_version_is_part_of_the_key(call, monkeypatch):
    call("run", "tiny.yaml")
    monkeypatch.setattr(artifact, "version", lambda: "9.9")
    monkeypatch.setattr("openqwen.recipe.plan.version", lambda: "9.9")
    call("run", "tiny.yaml", "--until", "corpus")
    assert call.ran == ["corpus"]
    assert "-> 9.9" in call.out


def test_other_code_is_told_but_reused(call, monkeypatch):
    call("run", "tiny.yaml")
    monkeypatch.setattr("openqwen.recipe.runner.code_digest", lambda: "other")
    call("run", "tiny.yaml")
    assert call.ran == []
    assert (
        "Made by another version of the code: corpus, learn, online-score (--from corpus remakes them)."
        in call.out
    )


def test_content_of_an_outside_folder_counts(call):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("one")
    call("run", "tiny.yaml", "--corpus", "texts")
    call("run", "tiny.yaml", "--corpus", "texts")
    assert call.ran == []
    Path("texts/a.txt").write_text("two")
    call("run", "tiny.yaml", "--corpus=texts")
    assert call.ran == ["corpus"]
    assert "its input folder changed" in call.out
    assert call("run", "tiny.yaml", "--corpus", "nowhere") == 1
    assert "does not exist" in call.err


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_text("short"), "weights.txt has 5 bytes, but 64 were written"),
        (lambda path: path.write_text("x" * 64), "weights.txt has sha256"),
        (lambda path: path.unlink(), "weights.txt is missing"),
        (lambda path: path.with_name("manifest.json").write_text('{"stage": '), "manifest.json"),
        (lambda path: path.with_name("manifest.json").unlink(), "manifest.json"),
        (lambda path: path.with_name("manifest.json").write_text("{}"), "This manifest is damaged"),
    ],
)
def test_damage_is_named_and_mended_by_from(call, damage, told):
    call("run", "tiny.yaml")
    digests = {name: manifest["digest"] for name, manifest in manifests().items()}
    damage(RUN / "learn" / "weights.txt")
    assert call("run", "tiny.yaml") == 1
    assert call.ran == []
    assert told in call.err
    assert "--from learn" in call.err
    assert call("run", "tiny.yaml", "--dry-run") == 0
    assert "blocked" in call.out
    assert call("run", "tiny.yaml", "--from", "learn") == 0
    assert {name: manifest["digest"] for name, manifest in manifests().items()} == digests
    assert call("run", "tiny.yaml") == 0


def test_until_and_from(call):
    call("run", "tiny.yaml", "--until", "learn")
    assert call.ran == ["corpus", "learn"]
    call("run", "tiny.yaml", "--from", "learn")
    assert call.ran == ["learn", "online-score"]
    call("run", "tiny.yaml")
    assert call.ran == []
    assert call("run", "tiny.yaml", "--from", "lern") == 1
    assert "Did you mean 'learn'?" in call.err
    assert call("run", "tiny.yaml", "--until", "corpus", "--from", "learn") == 1
    assert "Nothing is left to run" in call.err


def test_a_failed_from_keeps_the_old_artifact_and_is_continued_without_the_flag(call, monkeypatch):
    call("run", "tiny.yaml")
    before = manifests()
    monkeypatch.setenv("FAKE_BUG", "1")
    assert call("run", "tiny.yaml", "--from", "learn") == 70
    assert manifests() == before
    assert "Kept: 1 finished stage and the state that learn saved at" in call.out
    report = next(RUN.glob("openqwen-error-*.txt"))
    assert "RuntimeError: a bug" in report.read_text()
    assert str(report) in call.err
    assert "Traceback" not in call.err
    monkeypatch.delenv("FAKE_BUG")
    call("run", "tiny.yaml", "--dry-run")
    assert "resume" in call.out
    assert call("run", "tiny.yaml") == 0
    assert call.ran == ["learn", "online-score"]
    assert "resuming from its saved state" in call.out
    assert manifests()["learn"]["created"] != before["learn"]["created"]
    assert manifests()["learn"]["digest"] == before["learn"]["digest"]


def test_dry_run_plans_and_changes_nothing(call):
    assert call("run", "tiny.yaml", "--dry-run") == 0
    assert call.ran == []
    assert not RUN.exists()
    assert "not made yet" in call.out
    assert "~3s + 2 unknown" in call.out
    call("run", "tiny.yaml")
    before = snapshot()
    call("run", "tiny.yaml", "--dry-run", "--learn.train.steps", "7")
    assert snapshot() == before
    lines = {line.split()[0]: line for line in call.out.splitlines() if line.split()}
    assert "reuse" in lines["corpus"]
    assert "train.steps 20 -> 7" in lines["learn"]
    assert "its input learn is remade" in lines["online-score"]
    assert "2 of 3 to make" in call.out


def test_a_file_where_the_run_folder_goes(call):
    Path("runs").write_text("")
    assert call("run", "tiny.yaml") == 1
    assert "cannot be made" in call.err


def test_a_folder_where_a_link_goes(call):
    (RUN / "learn").mkdir(parents=True)
    assert call("run", "tiny.yaml") == 1
    assert "A stage's link cannot be made here" in call.err


def test_stages_that_train_can_be_told_to_other_ranks():
    stages = {node.stage.name: node.stage for node in nodes_of(recipe_class()())}
    told = {
        name: pickle.loads(pickle.dumps(s.run)) for name, s in stages.items() if s.trains_on_ranks
    }
    assert set(told) == {"pretrain", "extend", "sft", "reward", "dpo", "online-dpo", "grpo"}
    assert all(callable(run) for run in told.values())


def test_a_folder_outside_may_bear_the_name_of_the_stage_that_reads_it(call):
    """The report took it for the stage itself, and its lineage for endless."""
    Path("corpus").mkdir()
    Path("corpus/a.txt").write_text("one")
    assert call("run", "tiny.yaml", "--corpus", "corpus") == 0
    assert (RUN / "report.html").is_file()
