"""benchmarks/alignment.py: intervals over seeds and problems, its tables, and a toy recipe."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TOY = """
seed: 3
corpus: {folder: CORPUS, task_documents: 60, weights: {tasks: 3}, heldout_share: 0.1}
tokenizer: {vocabulary: 400, max_bytes: 100000}
pretrain:
  network: {hidden_size: 32, intermediate_size: 64, layers: 1, heads: 2, kv_heads: 1}
  data: {tokens: 8000, context: 96, batch_tokens: 1024}
extend: {data: {tokens: 2000, context: 128, batch_tokens: 1024}}
instruct: {demonstrations: 60, repurposed: 5, prompts: 8}
sft: {epochs: 1, batch: 8, max_length: 200}
prefer: {prompts: 16, heldout_prompts: 10, samples: 1}
reward: {batch: 8, max_length: 200}
dpo: {batch: 8, max_length: 200}
online_dpo: {steps: 1, batch: 2, samples: 2, max_tokens: 4}
grpo: {episodes: 1, batch: 2, samples: 2, max_tokens: 4}
evaluate: {context: 128, heldout_bytes: 2000, checked: 17, test: 34, sample_tokens: 2, max_tokens: 6}
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("alignment")


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (1e6, 1.96)]
)
def test_students_t(script, freedom, expected):
    """The values of printed tables."""
    assert script.t_quantile(freedom) == pytest.approx(expected, abs=2e-4)


def test_one_seed_has_the_interval_over_problems(script):
    from openqwen.evaluate.intervals import paired_gain

    rng = np.random.default_rng(0)
    values, problems = rng.integers(-1, 2, 400).astype(float), [str(n // 2) for n in range(400)]
    found = script.interval(values[None], problems)
    expected = paired_gain(np.zeros(400), values, problems)
    # The same variance; t with 199 degrees of freedom is 0.6 % wider than the normal distribution.
    assert found.mean == pytest.approx(expected[0])
    assert found.high - found.low == pytest.approx(1.0061 * (expected[2] - expected[1]), rel=1e-3)


def test_equal_values_have_no_width(script):
    assert script.interval(np.ones((3, 4)), list("abcd")) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("by_seed", "by_problem"), [(0.0, 0.3), (0.05, 0.3), (0.3, 0.3), (0.3, 0.0)]
)
def test_nineteen_of_twenty_intervals_hold_the_truth(script, by_seed, by_problem):
    """Three seeds, sixty problems in two wordings, the mean of the whole population at 0."""
    rng, held, runs = np.random.default_rng(1), 0, 400
    problems = [str(n // 2) for n in range(120)]
    for _ in range(runs):
        seeds, items = rng.normal(0, by_seed, (3, 1)), rng.normal(0, by_problem, 60).repeat(2)
        found = script.interval(seeds + items + rng.normal(0, 0.3, (3, 120)), problems)
        held += found.low <= 0 <= found.high
    # Over problems alone 0.36 of them hold it where seeds differ as much as problems do.
    assert 0.92 < held / runs < 0.98


def fake_run(folder, seed):
    """What `tables` reads: SFT's and DPO's answers to the same forty items."""
    rng = np.random.default_rng(seed)
    answers = {}
    for stage, share in (("sft", 0.5), ("dpo", 0.7)):
        made = folder / f"evaluate-{stage}"
        made.mkdir(parents=True)
        manifest = {"stage": made.name, "kind": "evaluate", "key": "k", "digest": "d"}
        (made / "manifest.json").write_text(json.dumps(manifest))
        scores = {"test_accuracy": share} | ({"start": "sft"} if stage == "dpo" else {})
        (made / "scores.json").write_text(json.dumps(scores))
        answers[stage] = [
            {
                "prompt": f"question {n}",
                "correct": bool(rng.random() < share),
                "correct_at_0.7": True,
                "sampled_correct": n % 4 == 0,
                "style": n % 2 == 0,
                "style_at_0.7": True,
                "sampled_style": False,
            }
            for n in range(40)
        ]
        lines = "".join(json.dumps(answer) + "\n" for answer in answers[stage])
        (made / "test.jsonl").write_text(lines)
    return answers


def test_tables_of_several_seeds(script, tmp_path, monkeypatch):
    run_module = importlib.import_module("openqwen.recipe.report.run")
    monkeypatch.setattr(
        run_module, "_manifest", lambda folder: json.loads((folder / "manifest.json").read_text())
    )
    made = [fake_run(tmp_path / f"seed-{seed}", seed) for seed in (1, 2)]
    text = script.tables([run_module.load_run(tmp_path / f"seed-{seed}") for seed in (1, 2)])
    rows = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()}
    mean = lambda stage, seed: 100 * np.mean([a["correct"] for a in made[seed][stage]])
    gains = [mean("dpo", seed) - mean("sft", seed) for seed in (0, 1)]
    greedy = rows["| dpo", "greedy"]
    assert f"{mean('dpo', 0):.1f}, {mean('dpo', 1):.1f}" in greedy
    assert f"{np.mean(gains):+.1f} [" in greedy
    assert "on sft" in greedy
    assert f"{gains[0]:+.1f}, {gains[1]:+.1f}" in greedy
    assert "+0.0 [+0.0, +0.0] on sft" in rows["| dpo", "at 1.0"]
    assert "| 50.0, 50.0 | 50.0 [33.8, 66.2] |" in rows["| sft", "style, greedy"]
    assert "| +0.0 [+0.0, +0.0] on sft | +0.0, +0.0 |" in rows["| dpo", "style, greedy"]
    far = abs(mean("sft", 0) - mean("sft", 1)) / 2
    assert f"seeds lie within ±{far:.1f} of their mean" in rows["| sft", "greedy"]


def test_nothing_is_finished(script, tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        script.main(["tiny", "--output", str(tmp_path), "--print"])


@pytest.mark.slow
def test_a_toy_recipe_with_two_seeds_goes_on_where_it_stopped(tmp_path):
    modules = Path(json.__file__).parent.glob("*.py")
    (tmp_path / "corpus").mkdir()
    for path in [*modules, *Path(importlib.__file__).parent.glob("*.py")]:
        (tmp_path / "corpus" / f"{path.parent.name}_{path.name}").write_bytes(path.read_bytes())
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY.replace("CORPUS", str(tmp_path / "corpus")))
    command = [sys.executable, SCRIPTS / "alignment.py", recipe, "--output", tmp_path / "runs"]
    command += ["--seeds", "1", "2"]

    def printed(*more):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    early = printed("--", "--until", "evaluate-sft")
    assert "| sft | greedy |" in early
    assert "| dpo |" not in early
    late = printed()
    for text in ("| dpo | greedy |", "| online-dpo | at 1.0 |", "seed-1 ", "seed-2 ", "on sft"):
        assert text in late
    assert late[late.index("`") :] == printed("--print")
    assert early[early.index("| sft | greedy") :].splitlines()[0] in late
