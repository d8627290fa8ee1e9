"""benchmarks/alignment_tax.py: equal rewards, its table and picture, and a run on random models."""

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from openqwen.corpus.documents import write_documents
from openqwen.model import ModelConfig, Qwen2, Scorer, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.tasks.checkable import generate_tasks
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
NETWORK = ModelConfig(600, 32, 48, 2, 2, 1, max_position_embeddings=256, tie_word_embeddings=True)
TOY = """
online_dpo: {steps: 3, batch: 2, samples: 3, max_tokens: 6, baseline: 0, save: {seconds: 0}, train: {learning_rate: 1e-2}}
dpo: {epochs: 1, batch: 4, max_length: 200, train: {learning_rate: 1e-2}}
grpo: {episodes: 2, batch: 2, samples: 3, max_tokens: 6, rewards: {sources: [reward]}, train: {learning_rate: 1e-2}}
evaluate: {context: 64, heldout_bytes: 400, checked: 34, max_tokens: 6}
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return [importlib.import_module(name) for name in ("alignment_tax", "tax_curves")]


def point(step, reward, greedy, bits):
    """One measurement of four tasks and two documents."""
    return {
        "step": step,
        "reward": [reward - 1, reward - 1, reward + 1, reward + 1],
        "style": [0, 0, 1, 1],
        "greedy": greedy,
        "sampled": greedy,
        "problems": list("aabc"),
        "bits": bits,
        "bytes": [100, 300],
    }


@pytest.fixture
def arms(scripts):
    """Two arms of two seeds. The deviation of the first rewards is 1."""
    Curve = scripts[1].Curve
    fast = [point(0, 5, [1, 1, 1, 1], [200, 600]), point(4, 9, [0, 0, 1, 1], [200, 680])]
    slow = [
        point(0, 5, [1, 1, 1, 1], [200, 600]),
        point(4, 6, [1, 1, 1, 1], [200, 600]),
        point(8, 8, [1, 1, 1, 0], [200, 640]),
    ]
    return [Curve("AdamW", "dpo, β 1", [fast, fast]), Curve("OnTIES", "dpo, β 1", [slow, slow])]


def test_changes_are_read_where_the_reward_is_the_same(scripts, arms):
    fast, slow = arms
    assert scripts[1].common_reward(arms) == 3.0
    # Three quarters of the way: half of the tasks and 80 of 800 bits in 400 bytes, times 3/4.
    assert fast.loss("greedy", 3.0).mean == pytest.approx(-0.375)
    assert fast.loss("text", 3.0).mean == pytest.approx(0.75 * 80 / 400)
    assert slow.loss("greedy", 3.0).mean == pytest.approx(-0.25)
    assert slow.loss("text", 2.0).mean == pytest.approx(0.5 * 40 / 400)
    assert slow.loss("text", 0.5).mean == pytest.approx(0.0)
    assert slow.loss("greedy", 3.0, fast).mean == pytest.approx(0.125)
    assert slow.step_at(0, 2.0) == (2, 0.5)


def test_each_seed_may_hold_out_other_documents(scripts, arms):
    one = [point(0, 5, [1] * 4, [200, 600]), point(4, 9, [1] * 4, [200, 680])]
    other = [{**p, "bits": [400], "bytes": [100]} for p in one]
    other[1]["bits"] = [430]
    found = scripts[1].Curve("AdamW", "dpo, β 1", [one, other]).loss("text", 4.0)
    assert found.mean == pytest.approx((80 / 400 + 30 / 100) / 2)
    assert found.low < 0.2 < 0.3 < found.high  # over seeds


def test_an_arm_that_hardly_moves_does_not_set_the_reward(scripts, arms):
    still = scripts[1].Curve("still", "dpo, β 1", [[point(0, 5, [1] * 4, [1, 1])]] * 2)
    assert scripts[1].common_reward([*arms, still]) == 3.0
    text = scripts[1].table([*arms, still])
    assert "| still | reaches 0.000 | – | – | – |" in text
    assert "| OnTIES | 8 | +0.1000" in text
    assert "(+12.5 [" in text


def test_the_picture_has_a_line_for_each_arm_and_skill(scripts, arms):
    root = ElementTree.fromstring(scripts[1].draw(arms))
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert len(lines) == 2 * len(scripts[1].SKILLS)
    shown = "".join(root.itertext())
    assert "AdamW" in shown
    assert "OnTIES" in shown
    points = np.array([[float(x) for x in p.split(",")] for p in lines[0].get("points").split()])
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) < 0).all()  # more bits are further up


@pytest.fixture
def run_folder(tmp_path):
    """What a finished run has, with random networks."""
    folder = tmp_path / "run"
    texts = [f"def f{n}(x):\n    return x + {n}\n" for n in range(12)]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=300))
    for seed, (kind, name) in enumerate(((Qwen2, "extend"), (Qwen2, "sft"), (Scorer, "reward"))):
        model = kind(NETWORK)
        initialize(model, torch.Generator().manual_seed(seed))
        with torch.no_grad():  # answers end, and rewards differ
            model.model.embed_tokens.weight[tokenizer.eos_id].mul_(4.0)
        save_checkpoint(model, tokenizer, folder / name)
    for name in ("corpus", "instruct", "prefer"):
        (folder / name).mkdir()
    documents = [
        {"id": str(n), "text": text, "source": "code", "meta": {}} for n, text in enumerate(texts)
    ]
    write_documents(folder / "corpus" / "heldout.parquet", documents)
    tasks = generate_tasks(Generators(1)["tasks"], 20, split="train")
    prompts = [{"prompt": t.prompt, "grader": t.grader, "reference": t.reference} for t in tasks]
    pairs = [
        {
            "prompt": task.prompt,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no\nDone."}],
        }
        for task in tasks
    ]
    for path, lines in (("instruct/prompts", prompts), ("prefer/preferences", pairs)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{path}.jsonl").write_text(text)
    (tmp_path / "toy.yaml").write_text(TOY)
    return folder


def test_a_run_without_a_reward_model_is_refused(scripts, run_folder, tmp_path):
    (run_folder / "reward" / "config.json").unlink()
    with pytest.raises(OpenQwenError, match=r"reward/config\.json"):
        scripts[0].main([str(run_folder), "--output", str(tmp_path / "tax")])


def test_all_stages_go_on_where_they_were_stopped(
    scripts, run_folder, tmp_path, monkeypatch, capsys
):
    program = scripts[0]

    def train(name, *more):
        given = [run_folder, "--output", tmp_path / name, "--recipe", tmp_path / "toy.yaml"]
        given += ["--seeds", "1", "2", "--every", "1", *more]
        program.main(list(map(str, given)))
        return capsys.readouterr().out

    optimizers = {name: program.OPTIMIZERS[name] for name in list(program.OPTIMIZERS)[:3]}
    monkeypatch.setattr(program, "OPTIMIZERS", optimizers)
    whole = train("whole", "--stages", "online-dpo", "dpo", "grpo")
    for text in ("**online-dpo, β 0.001**", "**dpo, β 0.001**", "**grpo, β 0.001**", "OnTIES"):
        assert text in whole
    assert not list((tmp_path / "whole").glob("*/*/"))  # states are gone
    files = sorted((tmp_path / "whole").glob("*/*.json"))
    assert len(files) == 18
    points = json.loads(files[0].read_text())["points"]
    assert points[0]["reward"] != points[-1]["reward"]

    real, calls = program.Probe._measured, []

    def stopping(self, model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(program.Probe, "_measured", stopping)
    arms = ["--stages", "online-dpo", "--arms", "OnDARE"]
    with pytest.raises(KeyboardInterrupt):
        train("stopped", *arms)
    again = train("stopped", *arms)
    for path in (tmp_path / "stopped").glob("*/*.json"):
        same = tmp_path / "whole" / path.relative_to(tmp_path / "stopped")
        assert path.read_bytes() == same.read_bytes()
    monkeypatch.setattr(program, "train_arm", None)
    assert train("stopped", *arms, "--print")[-200:] == again[-200:]
