"""The Online Merging Optimizer against the paper's equations, AdamW, and itself on other paths."""

import itertools
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from openqwen.model import kernels as model_kernels
from openqwen.support import native, splitmix
from openqwen.support.errors import OpenQwenError
from openqwen.train.merging import OnlineMerging, kernels
from openqwen.train.merging.masks import LocalElements, random_mask, stream

SHAPES = {"matrix": (40, 30), "vector": (77,), "three": (3, 5, 7)}
FORMS = [
    {"form": "dare", "scaling": "inverse"},
    {"form": "dare", "scaling": "none"},
    {"form": "ties", "signs": "weighted"},
    {"form": "ties", "signs": "unweighted"},
]
LR, BETAS, EPS, DECAY, SEED = 1e-2, (0.9, 0.95), 0.05, 0.1, 11


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: torch.from_numpy(rng.normal(0, scale, s)) for n, s in SHAPES.items()}


def gradients(step):
    return draw(1_000 + step)


def train(steps, dtype=torch.float32, start=None, optimizer=None, first=0, **settings):
    """The optimizer and the weights after some steps from a reference."""
    reference, base = draw(1), draw(2)
    weights = start or {n: t.to(dtype).clone().requires_grad_() for n, t in reference.items()}
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY} | settings
    optimizer = optimizer or OnlineMerging(
        weights.items(),
        [t.to(dtype) for t in reference.values()],
        [t.to(dtype) for t in base.values()],
        generator=torch.Generator().manual_seed(SEED),
        **settings,
    )
    for step in range(first, steps):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient.to(dtype)
        optimizer.step()
    return optimizer, weights


def transcription(steps, form, alpha, reserve, every=1, scaling="inverse", signs="weighted"):
    """The paper's equations, entry by entry in float64. Only the random masks are ours."""

    def F(x, key, scale):
        if form == "ties":
            k = max(1, int(reserve * x.size))
            chosen = np.argsort(-np.abs(x), kind="stable")[:k]
            mask = np.isin(np.arange(x.size), chosen)
        else:
            mask = random_mask(key, reserve, LocalElements(x.size, run=x.size), "cpu").numpy()
        return np.where(mask, x, 0.0) * scale

    def join(a, b, p, q):  # p a ⊕ q b
        if form == "dare":
            return p * a + q * b
        if signs == "unweighted":
            sign = np.where(a + b >= 0, 1.0, -1.0)
            return p * a * (np.sign(a) == sign) + q * b * (np.sign(b) == sign)
        a, b = p * a, q * b
        larger = np.where(np.abs(a) > np.abs(b), a, np.where(np.abs(b) > np.abs(a), b, 0.0))
        return np.where(np.sign(a) * np.sign(b) < 0, larger, a + b)

    reference, base, result = draw(1), draw(2), {}
    scale = 1 / reserve if form == "dare" and scaling == "inverse" else 1.0
    for name in SHAPES:
        theta = reference[name].numpy().ravel().copy()
        tau = theta - base[name].numpy().ravel()
        m, v, cache = (np.zeros_like(theta) for _ in range(3))
        for t in range(1, steps + 1):
            g = gradients(t - 1)[name].numpy().ravel()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g**2
            d = -LR * (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
            theta = theta * (1 - LR * DECAY)
            if t % every:
                theta, cache = theta + d, cache + d
                continue
            fixed = F(tau, stream(SEED, name, "task"), scale)
            if scaling == "inverse":
                f = np.clip(fixed, -1, 1) if form == "dare" else fixed
            else:
                f = F(tau, stream(SEED, name, t, "task"), scale)
            kept = F(d + cache, stream(SEED, name, t, "step"), scale)
            theta = theta - cache + join(kept, f, 1 - alpha, alpha)
            cache = np.zeros_like(theta)
        result[name] = theta
    return result


@pytest.fixture(params=["compiled", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(kernels, "usable", lambda *_: False)
    elif not kernels.usable(torch.zeros(1)):
        pytest.skip("there is no compiler")
    return request.param


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("reserve", [1.0, 0.4, 0.03])
@pytest.mark.parametrize("every", [1, 3])
def test_twenty_steps_are_those_of_the_papers_equations(settings, reserve, every, path):
    settings = settings | {"alpha": 1e-3, "reserve": reserve, "every": every}
    right = transcription(20, **settings)
    kinds = ((torch.float64, 1e-13), (torch.float32, 2e-6))
    for dtype, bound in kinds if path == "plain" else kinds[1:]:
        _, weights = train(20, dtype, **settings)
        for name, weight in weights.items():
            found = weight.detach().double().numpy().ravel()
            np.testing.assert_allclose(found, right[name], rtol=bound, atol=bound, err_msg=name)


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 1e-4])
@pytest.mark.parametrize("reserve", [1.0, 0.4, 0.01])
def test_the_compiled_step_gives_the_bits_of_the_plain_one(
    settings, every, alpha, reserve, monkeypatch
):
    settings = settings | {"alpha": alpha, "reserve": reserve, "every": every}
    _, compiled = train(5, **settings)
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    _, plain = train(5, **settings)
    for name in SHAPES:
        assert torch.equal(compiled[name], plain[name]), name


OLDER = {"avx2": ("-mno-avx512f",), "loops": ("-mno-avx512f", "-mno-avx2", "-mno-fma")}


@pytest.fixture(params=["this", *OLDER])
def processor(request, monkeypatch):
    """The step is compiled for this processor or for an older one."""
    if request.param not in OLDER:
        return
    folder = Path(model_kernels.__file__).parent / "native"
    names = ("lanes.h", "masks.h", "places.h", "pool.h", "pool.cpp", "merging.cpp")
    sources = [folder / name for name in names]
    flags = (*model_kernels._FLAGS, *OLDER[request.param])
    if platform.machine() != "x86_64" or not (older := native.load("merging", sources, flags)):
        pytest.skip("builds for older processors are of x86-64")

    def function(name, *arguments):
        kernel = getattr(older, name)
        kernel.argtypes, kernel.restype = arguments, None
        return kernel

    monkeypatch.setattr(kernels, "function", function)


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("reserve", [0.3, 0.02])
@pytest.mark.parametrize("size", [(5, 4096), (1, 20_003), (37, 541)])
def test_blocks_and_their_ends_have_the_bits_of_the_plain_step(
    settings, reserve, size, processor, monkeypatch
):
    """Tensors of several blocks, some of which end within sixteen elements."""
    rng = np.random.default_rng(5)
    reference, base = (torch.from_numpy(rng.normal(0, 1, size)).float() for _ in range(2))
    steps = [torch.from_numpy(rng.standard_cauchy(size)).float() for _ in range(4)]
    found = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(kernels, "usable", lambda *_: False)
        weight = reference.clone().requires_grad_()
        optimizer = OnlineMerging(
            [weight], [reference], [base], alpha=1e-3, reserve=reserve, lr=1e-2, **settings
        )
        for gradient in steps:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append((weight.detach(), optimizer.state[weight]["exp_avg_sq"]))
    for one, other in zip(*found):
        assert torch.equal(one, other)


def large(steps, rates, reserve=0.05, scale=lambda step: 1.0):
    """The weights of one large parameter after steps of OnTIES."""
    rng = np.random.default_rng(7)
    weight = torch.zeros(50_000, requires_grad=True)
    zeros = weight.detach().clone()
    settings = {"form": "ties", "reserve": reserve, "alpha": 1e-3, "betas": (0.9, 0.99)}
    optimizer = OnlineMerging([weight], [zeros], [zeros + 1], **settings)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step % len(rates)]
        weight.grad = torch.from_numpy(rng.normal(0, scale(step), 50_000)).float()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("rates", "scale"),
    [
        ([1e-2], lambda step: 1.0),
        ([1e-2, 1e-3, 0.0, 3e-2], lambda step: 1.0),
        ([1e-2], lambda step: 1e3 if step == 5 else 1.0),
        ([1e-2], lambda step: 0.0 if step < 3 else 1.0),
    ],
    ids=["steady", "rates", "jump", "zeros"],
)
def test_a_wrong_guess_of_the_threshold_changes_nothing(rates, scale, monkeypatch):
    found = large(9, rates, scale=scale)
    monkeypatch.setattr(kernels, "usable", lambda *_: False)
    assert torch.equal(found, large(9, rates, scale=scale))


def test_steady_steps_find_the_threshold_in_the_pass_of_the_moments(monkeypatch):
    calls = []
    count = kernels.count
    monkeypatch.setattr(kernels, "count", lambda *given: calls.append(1) or count(*given))
    if not kernels.usable(torch.zeros(1)):
        pytest.skip("there is no compiler")
    large(30, [1e-2])
    early = len(calls)
    large(60, [1e-2])
    assert len(calls) - early <= early + 2


def test_without_merging_and_dropping_it_is_adamw_to_the_bit():
    start = {n: t.float().requires_grad_() for n, t in draw(1).items()}
    plain = torch.optim.AdamW(
        start.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    for step in range(10):
        for name, gradient in gradients(step).items():
            start[name].grad = gradient.float()
        plain.step()
    for form, every in itertools.product(("dare", "ties"), (1, 4)):
        _, weights = train(10, form=form, alpha=0.0, reserve=1.0, every=every)
        for name in SHAPES:
            assert torch.equal(weights[name], start[name])


def test_the_mean_of_scaled_masked_steps_is_adamws():
    """OnDARE keeps a share of the entries and divides them by it."""
    weight = torch.zeros(100_000, requires_grad=True)
    optimizer = OnlineMerging(
        [weight], [weight.detach()], [weight.detach()], reserve=0.1, alpha=0.0, lr=1.0
    )
    weight.grad = torch.ones(100_000)
    optimizer.step()
    moved = weight.detach() != 0
    assert float(moved.float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(weight.detach().mean()) == pytest.approx(-1, abs=0.03)


@pytest.mark.parametrize("alpha", [1e-7, 1e-6])
def test_small_merges_are_not_rounded_away(alpha, path):
    """Unscaled, float32 would lose nearly all of α · τ in each step."""
    rng = np.random.default_rng(0)
    reference = torch.from_numpy(rng.normal(0, 0.02, 20_000)).float()
    tau = torch.from_numpy(rng.normal(0, 1e-3, 20_000)).float()
    weight = reference.clone().requires_grad_()
    optimizer = OnlineMerging(
        [weight], [reference], [reference - tau], scaling="none", alpha=alpha, reserve=1.0, lr=0.0
    )
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    exact = 400 * alpha * tau.double()
    moved = weight.detach().double() - reference.double()
    assert float((moved - exact).abs().max()) <= 2**-28  # half a unit in the last place
    naive = reference.clone()
    for _ in range(400):
        naive += alpha * tau
    error = (naive.double() - reference.double() - exact).norm() / exact.norm()
    assert float(error) > (0.5 if alpha == 1e-7 else 0.1)


def test_a_run_that_is_resumed_gives_the_bits_of_one_that_is_not():
    for settings in FORMS:
        settings = settings | {"alpha": 1e-3, "reserve": 0.1, "every": 2}
        _, whole = train(9, **settings)
        optimizer, half = train(5, **settings)
        half = {n: t.detach().clone().requires_grad_() for n, t in half.items()}
        resumed = OnlineMerging(
            half.items(),
            [t.float() for t in draw(1).values()],
            [t.float() for t in draw(2).values()],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            generator=torch.Generator().manual_seed(SEED),
            **settings,
        )
        resumed.load_state_dict(optimizer.state_dict())
        train(9, start=half, optimizer=resumed, first=5)
        for name in SHAPES:
            assert torch.equal(half[name], whole[name]), (settings, name)


def test_a_step_moves_every_parameter_between_merges():
    """The released code returns behind the first one."""
    _, before = train(0, form="dare")
    for steps in (1, 2):
        _, after = train(steps, form="dare", every=3)
        _, plain = train(steps, form="dare", alpha=0.0, reserve=1.0)
        for name in SHAPES:
            assert not torch.equal(after[name], before[name])
            torch.testing.assert_close(after[name], plain[name], rtol=1e-6, atol=1e-7)


def test_a_tiny_tensor_keeps_its_largest_entry(path):
    weight = torch.zeros(9, requires_grad=True)
    tau = torch.tensor([0, 0, 5.0, 0, -7.0, 1, 0, 0, 0])
    optimizer = OnlineMerging(
        [weight], [weight.detach()], [-tau], form="ties", reserve=0.01, alpha=0.5, lr=1e-3
    )
    weight.grad = torch.tensor([1, 2, 3, -4, 5, 6, -7, 8, 9.0])
    optimizer.step()
    # All nine steps are about equally large; the largest entry of τ is the fifth.
    assert weight.detach()[4] <= -3.5
    assert int((weight != 0).sum()) == 2


def test_equal_magnitudes_are_kept_in_the_order_of_their_index(path):
    weight = torch.zeros(5_000, requires_grad=True)
    optimizer = OnlineMerging(
        [weight], [weight.detach()], [weight.detach()], form="ties", reserve=0.3, alpha=0.0, lr=1.0
    )
    weight.grad = torch.ones(5_000)
    optimizer.step()
    assert (weight != 0).nonzero().flatten().tolist() == list(range(1_500))


@pytest.mark.parametrize("size", [1, 50, 70_000])
@pytest.mark.parametrize("reserve", [0.001, 0.2, 0.9])
def test_the_kept_entries_are_those_of_torch_topk(size, reserve, path):
    rng = np.random.default_rng(size)
    weight = torch.zeros(size, requires_grad=True)
    zeros = weight.detach().clone()
    settings = {"form": "ties", "reserve": reserve, "alpha": 0.0, "lr": 1.0, "eps": 1.0}
    optimizer = OnlineMerging([weight], [zeros], [zeros], **settings)
    weight.grad = torch.from_numpy(rng.standard_cauchy(size)).float()
    optimizer.step()
    whole = (weight.grad / (weight.grad.abs() + 1)).abs()
    expected = whole.topk(max(1, int(reserve * size))).indices
    kept = (weight != 0).nonzero().flatten()
    # Where float32 makes magnitudes equal, topk may choose others of them.
    torch.testing.assert_close(whole[kept].sort().values, whole[expected].sort().values)


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: "-".join(s.values()))
def test_nan_in_a_gradient_stays_in_its_entry(settings, path):
    weight = torch.zeros(100, requires_grad=True)
    zeros = weight.detach().clone()
    optimizer = OnlineMerging([weight], [zeros], [zeros + 1], reserve=0.5, lr=1e-3, **settings)
    weight.grad = torch.ones(100)
    weight.grad[7] = torch.nan
    optimizer.step()
    assert torch.isfinite(weight[torch.arange(100) != 7]).all()


def test_wrong_arguments_are_named():
    weight = torch.zeros(3, requires_grad=True)
    zeros = torch.zeros(3)
    for settings, words in (
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"reserve": 0.0}, "reserve is 0.0"),
        ({"every": 0}, "every is 0"),
        ({"form": "tie"}, "form is 'tie'"),
        ({"scaling": "L1"}, "scaling is 'L1'"),
        ({"signs": "both"}, "signs is 'both'"),
    ):
        with pytest.raises(OpenQwenError, match=words):
            OnlineMerging([weight], [zeros], [zeros], **settings)
    with pytest.raises(OpenQwenError, match=r"'a' is \[3\], in the base \[4\]"):
        OnlineMerging([("a", weight)], [zeros], [torch.zeros(4)])
    with pytest.raises(OpenQwenError, match="The base has no tensor for '0'"):
        OnlineMerging([weight], [zeros], [])
    with pytest.raises(OpenQwenError, match="task vector of '0' is not finite"):
        OnlineMerging([weight], [zeros], [zeros + torch.nan])


@pytest.mark.parametrize("settings", FORMS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("reserve", [1.0, 0.01])
def test_a_task_vector_in_a_file_or_in_bfloat16_gives_nearly_the_same(settings, reserve, tmp_path):
    settings = settings | {"alpha": 1e-2, "reserve": reserve}
    _, memory = train(5, **settings)
    _, mapped = train(5, folder=tmp_path / "task", **settings)
    _, rounded = train(5, dtype=torch.float32, store=torch.bfloat16, **settings)
    for name in SHAPES:
        assert torch.equal(memory[name], mapped[name])
        moved = (memory[name].detach() - draw(1)[name]).norm()
        assert float((memory[name] - rounded[name]).detach().norm()) <= 0.01 * float(moved)
    assert list((tmp_path / "task").glob("*")) == []


def test_parameters_in_bfloat16_move_by_what_float32_moves():
    """A step smaller than their rounding is kept until it is large enough."""
    weights = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(1_000, dtype=dtype, requires_grad=True)
        base = torch.zeros(1_000, dtype=dtype)
        optimizer = OnlineMerging(
            [weight], [weight.detach()], [base], reserve=1.0, alpha=1e-4, lr=0.0
        )
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        weights[dtype] = weight.detach().float()
    assert float(weights[torch.float32].mean()) == pytest.approx(1.01, abs=1e-6)
    assert float(weights[torch.bfloat16].mean()) == pytest.approx(1.01, abs=2**-8)


def test_masks_are_splitmix_at_a_counter():
    key, share = stream(5, "x"), 0.3
    words = splitmix.mix(
        np.uint64(key) + np.arange(1, 501, dtype=np.uint64) * np.uint64(splitmix.GAMMA)
    )
    halves = words.view(np.uint32)  # the lower half first
    expected = halves < round(share * 2**32)
    found = random_mask(key, share, LocalElements(1_000, run=1_000), "cpu").numpy()
    assert (found == expected).all()
    # A part that is cut in its last dimension: rows 2 and 3, columns 3 to 6 of 10 columns.
    part = random_mask(key, share, LocalElements(8, first=23, run=4, stride=10), "cpu").numpy()
    assert (part.reshape(2, 4) == expected.reshape(100, 10)[2:4, 3:7]).all()


def test_a_closure_is_evaluated_with_gradients():
    weight = torch.ones(3, requires_grad=True)
    optimizer = OnlineMerging([weight], [torch.ones(3)], [torch.zeros(3)], reserve=1.0, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3
    assert (weight < 1).all()
