"""The GPU's attention to pages, with plain functions in place of its kernels; the kernel in
Triton's interpreter.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from openqwen.model import Cache, ModelConfig, Paged, paged_gpu
from openqwen.model.rope import rotate

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)
SIZE = 4  # slots of a page


def exact(q_nHd: Tensor, k_mKd: Tensor, v_mKd: Tensor) -> Tensor:
    """The last n of m tokens over all they may see, in float64."""
    n, m, group = len(q_nHd), len(k_mKd), q_nHd.shape[1] // k_mKd.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k_mKd, v_mKd))
    scores = torch.einsum("nhd,mhd->hnm", q_nHd.double(), k) / q_nHd.shape[-1] ** 0.5
    unseen = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def packed(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, most_rows: int, most: int
) -> Tensor:
    """What PyTorch's kernel for packed sequences computes."""
    assert (most_rows, most) == (int(rows.diff().max()), int(keys.diff().max()))
    bounds = zip(rows.tolist(), rows.tolist()[1:], keys.tolist(), keys.tolist()[1:])
    return torch.cat([exact(q[a:b], k[c:d], v[c:d]) for a, b, c, d in bounds]).to(q.dtype)


def decode(
    q_BHd: Tensor, keys: Tensor, values: Tensor, tables_BP: Tensor, totals_B: Tensor
) -> Tensor:
    """What the Triton kernel computes."""
    outs = []
    for q, table, total in zip(q_BHd, tables_BP, totals_B.tolist(), strict=True):
        k = keys[table].permute(0, 3, 1, 2).flatten(0, 1)[:total]
        v = values[table].permute(0, 2, 1, 3).flatten(0, 1)[:total]
        outs.append(exact(q[None], k, v)[0])
    return torch.stack(outs).to(q_BHd.dtype)


def write(
    k_BKd: Tensor,
    v_BKd: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    places: tuple[Tensor, Tensor],
) -> None:
    """What the Triton kernel that writes does."""
    page_B, slot_B = places
    keys[page_B, :, :, slot_B] = rotate(k_BKd, *rotation)
    values[page_B, :, slot_B] = v_BKd


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(paged_gpu, "packed_kernel", lambda *_: packed)
    plain = SimpleNamespace(paged_decode=decode, paged_write=write)
    monkeypatch.setattr(paged_gpu, "triton_kernels", lambda: plain)


def filled() -> tuple[Cache, Tensor]:
    """A cache of random numbers and the pages of four sequences."""
    generator = torch.Generator().manual_seed(0)
    store = Cache(CONFIG, pages=40, page_size=SIZE)
    store.keys.copy_(torch.randn(store.keys.shape, generator=generator))
    store.values.copy_(torch.randn(store.values.shape, generator=generator))
    return store, torch.randperm(40, generator=generator).view(4, 10)


def new_tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    heads = (CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.num_key_value_heads)
    q, k, v = (torch.randn(count, h, CONFIG.head_dim, generator=generator) for h in heads)
    return q, k, v


@pytest.mark.parametrize(
    ("totals", "new"),
    [
        ((7, 40, 13, 1), (1, 1, 1, 1)),
        ((7, 38, 13, 21), (1, 9, 13, 1)),
        ((5, 6, 7, 40), (5, 2, 3, 33)),
    ],
)
def test_mixtures_of_prompts_and_decoding_equal_plain_attention(kernels, totals, new):
    positions = torch.cat([torch.arange(t - n, t) for t, n in zip(totals, new)])
    q, k, v = new_tokens(sum(new))
    found = []
    for gpu in (False, True):
        store, tables = filled()
        paged = Paged(store, tables, totals, new)
        paged.__dict__["_gpu"] = paged_gpu.GpuPaged(store, tables, totals, new) if gpu else None
        paged._kernel = None
        found.append(paged.attend(q, k, v, paged.rotation(positions, CONFIG), 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_one_new_token_each_equals_plain_attention(kernels):
    totals = (7, 40, 13, 1)
    positions, (q, k, v) = torch.tensor(totals) - 1, new_tokens(4)
    store, tables = filled()
    plain = Paged(store, tables, totals, (1, 1, 1, 1))
    plain._kernel = None
    wanted = plain.attend(q, k, v, plain.rotation(positions, CONFIG), 1)
    again, _ = filled()
    paged = paged_gpu.PagedDecode(again, tables, torch.tensor(totals), None)
    found = paged.attend(q, k, v, paged.rotation(positions, CONFIG), 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.keys, store.keys)
    assert torch.equal(again.values, store.values)


def test_a_cpu_takes_none_of_it():
    assert not paged_gpu.suits(filled()[0])


SCRIPT = """
import sys, torch
sys.path.insert(0, {here!r})
from test_paged_gpu import decode, write
from openqwen.model.int8_triton import product
from openqwen.model.paged_triton import paged_decode, paged_write
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator)
for group, width, slots in ((7, 64, 16), (1, 32, 16), (5, 128, 4)):
    keys, values, q = draw(40, 2, width, slots), draw(40, 2, slots, width), draw(4, 2 * group, width)
    tables, totals = torch.randperm(40, generator=generator).view(4, 10), torch.tensor([1, 9, 4 * slots, 10 * slots])
    found = paged_decode(q, keys, values, tables, totals)
    torch.testing.assert_close(found, decode(q, keys, values, tables, totals), rtol=1e-5, atol=1e-5)
    k, v, rotation = draw(4, 2, width), draw(4, 2, width), (draw(4, 1, width // 2), draw(4, 1, width // 2))
    places, again = (torch.tensor([3, 39, 0, 5]), torch.tensor([0, 3, 1, 2])), (keys.clone(), values.clone())
    paged_write(k, v, rotation, keys, values, places)
    write(k, v, rotation, *again, places)
    torch.testing.assert_close(keys, again[0])
    assert torch.equal(values, again[1])
for rows, outputs, inputs in ((1, 50, 1500), (2, 96, 256), (20, 33, 300)):
    x, weight = draw(rows, inputs), torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale, bias = draw(outputs).abs(), draw(outputs)
    for shift in (None, bias):
        wanted = torch.nn.functional.linear(x, weight * scale[:, None], shift)
        torch.testing.assert_close(product(x, weight, scale, shift), wanted, rtol=1e-3, atol=0.5)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_in_the_interpreter_equal_plain_pytorch():
    code = SCRIPT.format(here=os.path.dirname(__file__))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
