"""What changes a row of scores before anything is drawn from it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.request import Sampling


def penalise(scores_V: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Change scores in place: repetition (prompt and answer), then frequency and presence (the answer), then biases.

    Repetition as in transformers: a positive score is divided by the penalty, a negative one multiplied. Frequency and
    presence as in OpenAI's API.
    """
    device = scores_V.device
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array([*prompt, *answer], np.int64))).to(device)
        found = scores_V[seen]
        factor = sampling.repetition_penalty
        scores_V[seen] = torch.where(found < 0, found * factor, found / factor)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        written, counts = np.unique(np.array(answer, np.int64), return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * torch.from_numpy(counts)
        scores_V[torch.from_numpy(written).to(device)] -= off.to(scores_V)
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias)
        # index_add, not +=: an id may be named twice.
        scores_V.index_add_(0, torch.tensor(ids, device=device), torch.tensor(biases, device=device).to(scores_V))
