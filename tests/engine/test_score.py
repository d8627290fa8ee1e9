"""Log-probabilities without a gradient, against the whole table in float64."""

import pytest
import torch
from tiny import model

from openqwen.engine import score
from openqwen.engine.score import score_tokens

NETWORK = model(seed=2)
HIDDEN_ND = torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
TARGETS_N = torch.randint(0, 320, (37,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 9, 37, 1000])
def test_chunks_give_the_whole_table(monkeypatch, rows):
    monkeypatch.setattr(score, "SCORES", rows * 320)
    sizes, logits = [], NETWORK.logits
    monkeypatch.setattr(NETWORK, "logits", lambda x: (sizes.append(len(x)), logits(x))[1])
    logprobs_N, top = score_tokens(NETWORK, HIDDEN_ND, TARGETS_N, 4, 300)
    assert max(sizes) <= rows
    assert sum(sizes) == 37, "the head is computed once for each target"
    assert not logprobs_N.requires_grad
    with torch.no_grad():
        table_NV = torch.log_softmax(logits(HIDDEN_ND).double(), -1)
    truth_N = table_NV.gather(1, TARGETS_N[:, None]).squeeze(1)
    assert logprobs_N.tolist() == pytest.approx(truth_N.tolist(), abs=1e-5)
    best = table_NV[:, :300].topk(4)
    assert [[i for i, _ in row] for row in top] == best.indices.tolist()
    values = torch.tensor([[value for _, value in row] for row in top])
    assert torch.allclose(values.double(), best.values, atol=1e-5)


def test_nothing_is_listed_unless_asked_for():
    logprobs_N, top = score_tokens(NETWORK, HIDDEN_ND, TARGETS_N)
    assert logprobs_N.dtype == torch.float32
    assert top == [[]] * 37
