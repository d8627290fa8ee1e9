"""`openqwen pretrain --sweep` and `openqwen pretrain --model` on a corpus of a few thousand tokens."""

import json
import shutil

import numpy as np
import pytest

from openqwen import cli
from openqwen.model import load_model
from openqwen.recipe.graph import recipe_class
from openqwen.train import shards, sweep
from openqwen.train.sweep import judge

NETWORK = ["--network.hidden-size", "16", "--network.intermediate-size", "32", "--network.layers", "1",
           "--network.heads", "2", "--network.kv-heads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, its tokenizer and its token shards, and a recipe file with small networks."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "raw").mkdir()
    rng = np.random.default_rng(0)
    for n in range(40):
        lines = [
            f"def f_{a}(x):\n    return x + {b}  # adds {b} to x\n"
            for a, b in rng.integers(0, 99, (20, 2))
        ]
        (folder / "raw" / f"m{n}.py").write_text("\n".join(lines))
    (folder / "small.yaml").write_text(
        "corpus: {task_documents: 20, heldout_share: 0.2}\ntokenizer: {vocabulary: 300}\n"
    )
    command = [
        "run",
        str(folder / "small.yaml"),
        "--corpus",
        str(folder / "raw"),
        "--output",
        str(folder / "run"),
    ]
    assert cli.main([*command, "--until", "tokens"]) == 0
    return folder / "run"


def inputs(made, **other):
    folders = {name: made / name for name in ("tokens", "tokenizer", "corpus")} | other
    return [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]


@pytest.fixture
def quick(monkeypatch):
    """The sweep with two networks of one layer."""
    size = {"intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    config = sweep.SweepConfig.model_validate(
        {"networks": {"one": size | {"hidden_size": 8}, "two": size | {"hidden_size": 16}}}
    )
    monkeypatch.setattr(
        sweep.SweepConfig.model_fields["networks"], "default_factory", lambda: config.networks
    )
    sweep.SweepConfig.model_rebuild(force=True)
    yield
    monkeypatch.undo()
    sweep.SweepConfig.model_rebuild(force=True)


def test_a_sweep_writes_cells_laws_doubts_and_a_picture_and_reuses_cells(
    made, tmp_path, quick, monkeypatch, capsys
):
    grid = ["--amounts", "1000", "2000", "--batch-tokens", "200", "400", "--data.context", "32", "--draws", "5",
            "--heldout-tokens", "500", "--target-parameters", "1e6", "--target-tokens", "1e6"]  # fmt: skip
    command = ["pretrain", "--sweep", *inputs(made), *grid, "--output", str(tmp_path / "sweep")]
    trained = []
    real = sweep.pretrain

    def counted(settings, *arguments):
        if len(trained) == stop[0]:
            raise KeyboardInterrupt
        trained.append(settings)
        return real(settings, *arguments)

    stop = [5]
    monkeypatch.setattr(sweep, "pretrain", counted)
    rates = ["--learning-rates", "1e-3", "1e-2"]
    assert cli.main([*command, *rates]) == 130
    stop[0] = None
    assert cli.main([*command, *rates]) == 0
    assert len(trained) == 16  # 5 cells before the kill were not trained again
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(result["cells"]) == 16
    assert len(result["optima"]) == len(result["bowls"]) == 4
    assert all(cell["loss"] > 0 for cell in result["cells"])
    assert {cell["parameters"] for cell in result["cells"]} == {1_000, 2_384}
    assert any("the best learning rate lies at the" in note for note in result["notes"])
    assert any("No law for the learning rate" in note for note in result["notes"])
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert result["notes"][0] in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")

    earlier = ["--earlier", str(tmp_path / "sweep"), "--learning-rates", "1e-3", "4e-3", "1e-2"]
    assert cli.main([*command[:-1], str(tmp_path / "wider"), *earlier]) == 0
    assert len(trained) == 16 + 8
    wider = json.loads((tmp_path / "wider" / "sweep.json").read_text())
    assert len(wider["cells"]) == 24
    assert [c for c in wider["cells"] if c["learning_rate"] != 4e-3] == result["cells"]
    assert "(known)" in capsys.readouterr().out


def law_cells(seed=0):
    """Records of cells under a known law."""
    rng = np.random.default_rng(seed)
    for n in (1e5, 4e5, 1.6e6):
        for d in (1e6, 4e6):
            for x in (-1.5, -0.5, 0.5, 1.5):
                for y in (-1.0, 0.0, 1.0):
                    loss = 3 + 0.1 * x * x + 0.1 * y * y + 0.002 * rng.normal()
                    rate, batch = 2.0 * n**-0.5 * d**0.1 * np.exp(x), 0.5 * d**0.6 * np.exp(y)
                    yield {
                        "parameters": n,
                        "tokens": d,
                        "learning_rate": rate,
                        "batch_tokens": batch,
                        "loss": loss,
                    }


def test_the_verdict_states_law_interval_and_reach():
    config = sweep.SweepConfig(target_parameters=1e8, target_tokens=1e8, draws=50)
    result = judge(list(law_cells()), config, 1)
    assert result["learning_rate"]["of_parameters"] == pytest.approx(-0.5, abs=0.02)
    assert result["batch_tokens"]["of_tokens"] == pytest.approx(0.6, abs=0.02)
    truth = 2.0 * 1e8**-0.5 * 1e8**0.1
    size, low, high = result["learning_rate"]["band"][-1]
    assert size == pytest.approx(1e8)
    assert low < truth < high
    assert result["notes"][0].startswith("Learning rate for 1e+08 parameters and 1e+08 tokens:")
    assert not any("not identified" in note for note in result["notes"])
    noisy = [
        cell | {"loss": cell["loss"] + 0.1 * (n * 7 % 5)} for n, cell in enumerate(law_cells())
    ]
    doubts = judge(noisy, config, 1)["notes"]
    assert any("not identified: the interval spans a factor of" in note for note in doubts)
    low_batches = [
        cell for cell in law_cells() if cell["batch_tokens"] < 0.5 * cell["tokens"] ** 0.6 * 1.5
    ]
    assert any(
        "are optima for a batch size on the edge" in note
        for note in judge(low_batches, config, 1)["notes"]
    )
    assert "62 times the largest network and 25 times the data" in result["notes"][-1]
    assert json.dumps(result, allow_nan=False)


def test_pretraining_goes_on_from_a_checkpoint_by_the_command_line(made, tmp_path, capsys):
    data = ["--data.tokens", "2000", "--data.context", "32", "--data.batch-tokens", "400"]
    assert (
        cli.main(["pretrain", *inputs(made), *NETWORK, *data, "--output", str(tmp_path / "base")])
        == 0
    )
    further = [
        "pretrain",
        *inputs(made),
        *data,
        "--rope-theta",
        "5e5",
        "--output",
        str(tmp_path / "further"),
    ]
    assert cli.main([*further, "--model", str(tmp_path / "base")]) == 0
    assert load_model(tmp_path / "further").config.rope_theta == 5e5
    manifest = json.loads((tmp_path / "further" / "manifest.json").read_text())
    base = json.loads((tmp_path / "base" / "manifest.json").read_text())
    assert manifest["inputs"]["model"]["stage"] == str(tmp_path / "base")
    assert base["metrics"]["parameters"] == manifest["metrics"]["parameters"]

    assert cli.main(["convert", str(tmp_path / "base"), str(tmp_path / "base.gguf")]) == 0
    assert (
        cli.main([*further[:-1], str(tmp_path / "same"), "--model", str(tmp_path / "base.gguf")])
        == 0
    )
    same = json.loads((tmp_path / "same" / "manifest.json").read_text())
    assert same["metrics"]["loss"] == manifest["metrics"]["loss"]

    capsys.readouterr()
    wrong = shutil.copytree(tmp_path / "base", tmp_path / "wrong")
    other = [
        "tokenizer",
        "--corpus",
        str(made / "corpus"),
        "--vocabulary",
        "290",
        "--output",
        str(tmp_path / "tokenizer"),
    ]
    assert cli.main(other) == 0
    for file in (tmp_path / "tokenizer").glob("*.json"):
        shutil.copy(file, wrong)
    shutil.copy(tmp_path / "tokenizer" / "merges.txt", wrong)
    assert cli.main([*further[:-1], str(tmp_path / "x"), "--model", str(wrong)]) == 1
    assert "its ids mean other text" in capsys.readouterr().err
    assert cli.main([*further[:-1], str(tmp_path / "x"), "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_damaged_shard_is_refused_before_training(made, tmp_path, capsys):
    tokens = shutil.copytree(made / "tokens", tmp_path / "tokens")
    shard = next(tokens.glob("*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(raw)
    command = [
        "pretrain",
        *inputs(made, tokens=tokens),
        *NETWORK,
        "--output",
        str(tmp_path / "model"),
    ]
    assert cli.main(command) == 1
    told = capsys.readouterr().err
    assert "does not have its checksum" in told
    assert shard.name in told
    assert not (tmp_path / "model").exists()


def test_the_weights_of_the_corpus_are_the_mixture_where_none_is_named(made):
    sources = shards.token_sources(made / "tokens")
    data = recipe_class()().pretrain.data
    assert sum(shards.weighted(data, made / "corpus", sources).mixture.values()) == pytest.approx(1)
    named = data.model_copy(update={"mixture": {"code": 1.0}})
    assert shards.weighted(named, made / "corpus", sources) == named


def test_pretraining_measures_held_out_text_and_keeps_the_best_weights(made, tmp_path):
    data = ["--data.tokens", "3000", "--data.context", "32", "--data.batch-tokens", "400"]
    asked = [
        "--validation.tokens",
        "500",
        "--validation.every",
        "2",
        "--validation.outcome",
        "best",
    ]
    command = ["pretrain", *inputs(made), *NETWORK, *data, "--output", str(tmp_path / "model")]
    assert cli.main([*command, "--validation.every", "2"]) == 1  # and nothing is held out
    assert cli.main([*command, *asked]) == 0
    log = [
        json.loads(line) for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()
    ]
    measured = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    assert len(measured) == -(-len(log) // 2)
    assert measured[-1] < measured[0]
