"""`openqwen corpus-mix`: the regression on known laws, and the whole search on a small corpus."""

import json

import numpy as np
import pytest

from openqwen import cli
from openqwen.support.errors import OpenQwenError
from openqwen.train import mixture_search
from openqwen.train.mixture_fit import (
    _MAPS,
    _quadratic,
    best_mixture,
    capped,
    draw_mixtures,
    fit_loss,
    spearman,
    within,
)

NATURAL = np.array([0.7, 0.2, 0.1])


def law(weights_MS):
    """Losses of three sources that fall with their own weight and a little with that of others."""
    scale, power = np.array([0.6, 1.2, 0.9]), np.array([0.1, 0.25, 0.2])
    own = 2 + scale * (weights_MS + 0.02) ** -power
    return own - 0.1 * weights_MS[:, [1, 2, 0]]


def drawn(count, seed=0):
    return draw_mixtures(NATURAL, (0.3, 5.0), count, np.random.default_rng(seed))


def test_a_known_law_is_found_from_few_runs():
    rng = np.random.default_rng(1)
    mixtures = drawn(48)
    losses = law(mixtures) + 0.005 * rng.normal(size=(48, 3))
    fits = [fit_loss(mixtures, losses[:, n]) for n in range(3)]
    others = drawn(500, 2)
    for n, fit in enumerate(fits):
        assert np.sqrt(np.mean((fit.at(others) - law(others)[:, n]) ** 2)) < 0.03
        assert fit.error < 0.05
        assert fit.rank > 0.9
    targets = np.full(3, 1 / 3)
    proposed = best_mixture(fits, targets, drawn(20_000, 3), 100)
    best = (law(drawn(200_000, 4)) @ targets).min()
    assert (law(proposed[None]) @ targets)[0] < best + 0.01
    assert (law(proposed[None]) @ targets)[0] < (law(NATURAL[None]) @ targets)[0] - 0.05


def test_the_leave_one_out_error_is_that_of_fits_without_the_run():
    mixtures = drawn(20)
    losses = law(mixtures)[:, 0] + 0.02 * np.random.default_rng(0).normal(size=20)
    fit = fit_loss(mixtures, losses)
    features = (_quadratic(_MAPS[fit.form](mixtures)) - fit.center) / fit.spread
    errors = []
    for out in range(20):
        kept = np.arange(20) != out
        # The mean is fitted too, without a penalty.
        rows = np.column_stack([features, np.ones(20)])
        penalty = np.diag([*np.full(features.shape[1], fit.ridge), 0.0])
        inside = rows[kept].T @ rows[kept] + penalty
        coefficients = np.linalg.solve(inside, rows[kept].T @ np.log(losses[kept]))
        errors.append(np.exp(rows[out] @ coefficients) - losses[out])
    assert fit.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-6)


def test_mixtures_are_shares_around_the_natural_one():
    mixtures = drawn(5_000)
    assert mixtures.sum(1) == pytest.approx(np.ones(5_000))
    assert (mixtures >= 0).all()
    assert mixtures.mean(0) == pytest.approx((NATURAL + 1 / 3) / 2, abs=0.02)
    assert (mixtures.max(1) > 0.95).mean() > 0.02  # some are nearly one source
    assert np.array_equal(mixtures, drawn(5_000))


def test_no_source_is_read_too_often():
    most = np.array([1.0, 0.3, 0.15])
    found = capped(drawn(1_000), most)
    assert found.sum(1) == pytest.approx(np.ones(1_000))
    assert (found <= most + 1e-9).all()
    free = drawn(1_000)
    inside = (free <= most).all(1)
    assert found[inside] == pytest.approx(free[inside])
    with pytest.raises(OpenQwenError, match="last for 90%"):
        capped(drawn(5), np.array([0.5, 0.2, 0.2]))


def test_no_mixture_is_proposed_beyond_those_that_were_seen():
    seen = np.array([[0.2, 0.8], [0.6, 0.4]])
    mixtures = np.array([[0.1, 0.9], [0.2, 0.8], [0.5, 0.5], [0.61, 0.39]])
    assert within(mixtures, seen).tolist() == [[0.2, 0.8], [0.5, 0.5]]
    assert within(mixtures[[0, 3]], seen).tolist() == mixtures[[0, 3]].tolist()


def test_long_documents_are_cut_and_nothing_is_lost():
    class Source:
        lengths = np.array([3, 10, 1, 8])

        def document(self, number):
            return np.arange(self.lengths[number]) + 100 * number

    cut = mixture_search.CutSource(Source(), 4)
    assert cut.lengths.tolist() == [3, 4, 4, 2, 1, 4, 4]
    pieces = [cut.document(n) for n in range(7)]
    assert [len(piece) for piece in pieces] == cut.lengths.tolist()
    whole = [Source().document(n) for n in range(4)]
    assert np.concatenate(pieces).tolist() == np.concatenate(whole).tolist()


def test_rank_correlation():
    up = np.array([1.0, 2.0, 5.0, 3.0])
    assert spearman(up, up**3) == pytest.approx(1)
    assert spearman(up, -up) == pytest.approx(-1)
    assert spearman(up, np.ones(4)) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three sources: much of one letter, little of two others."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    words = {name: [f"{name}{n}" for n in range(40)] for name in ("alpha", "beta", "gamma")}
    for name, count in (("alpha", 120), ("beta", 50), ("gamma", 50)):
        (folder / "raw" / name).mkdir(parents=True)
        for n in range(count):
            lines = [" ".join(rng.choice(words[name], 12)) + " and the." for _ in range(6)]
            (folder / "raw" / name / f"{n}.txt").write_text("\n".join(lines))
    (folder / "small.yaml").write_text(
        "corpus: {task_documents: 0, heldout_share: 0.2, presets: {'*': code}}\n"
        "tokenizer: {vocabulary: 300}\n"
    )
    words = ["run", str(folder / "small.yaml"), "--corpus", str(folder / "raw")]
    assert cli.main([*words, "--output", str(folder / "run"), "--until", "tokens"]) == 0
    return folder / "run"


def command(made, output, *more):
    folders = {name: made / name for name in ("tokens", "tokenizer", "corpus")}
    words = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
    words += ["--network.hidden-size", "16", "--network.intermediate-size", "32"]
    words += ["--network.layers", "1", "--proxies", "8", "--data.tokens", "6000", "--checks", "2"]
    words += ["--data.context", "32", "--data.batch-tokens", "512", "--simulated", "500"]
    return ["corpus-mix", *words, "--heldout-tokens", "300", "--output", str(output), *more]


def test_a_search_proposes_measures_and_goes_on(made, tmp_path, monkeypatch, capsys):
    trained = []
    real = mixture_search.pretrain

    def counted(settings, *arguments):
        if len(trained) == stop[0]:
            raise KeyboardInterrupt
        trained.append(settings.data.mixture)
        return real(settings, *arguments)

    stop = [5]
    monkeypatch.setattr(mixture_search, "pretrain", counted)
    assert cli.main(command(made, tmp_path / "mix")) == 130
    stop[0] = None
    assert cli.main(command(made, tmp_path / "mix")) == 0
    assert len(trained) == 8 + 2 * 2  # those before the kill were not trained again
    result = json.loads((tmp_path / "mix/mixture.json").read_text())
    assert result["sources"] == ["alpha", "beta", "gamma"]
    assert [proxy["weights"] for proxy in result["proxies"]] == [
        pytest.approx([mixture[name] for name in result["sources"]]) for mixture in trained[:8]
    ]
    assert np.array([proxy["losses"] for proxy in result["proxies"]]).shape == (8, 3)
    assert sum(result["mixture"].values()) == pytest.approx(1)
    assert len(result["natural"]["measured"]) == len(result["proposed"]["measured_means"]) == 2
    assert result["natural_share"]["alpha"] > 0.4
    out = capsys.readouterr().out
    assert "proposed: alpha" in out
    # Its own mixture makes a source's loss lower.
    weights = np.array([proxy["weights"] for proxy in result["proxies"]])
    losses = np.array([proxy["losses"] for proxy in result["proxies"]])
    for n in range(3):
        assert spearman(weights[:, n], losses[:, n]) < 0
    metrics = json.loads((tmp_path / "mix/manifest.json").read_text())["metrics"]
    assert metrics["proposed_loss"] == pytest.approx(np.mean(result["proposed"]["measured_means"]))


def test_what_cannot_be_searched(made, tmp_path, capsys):
    assert cli.main(command(made, tmp_path / "a", "--targets", "alpa", "1")) == 1
    assert "Did you mean 'alpha'?" in capsys.readouterr().err
    assert cli.main(command(made, tmp_path / "b", "--target-tokens", "100000000")) == 1
    assert "All sources together last for" in capsys.readouterr().err
