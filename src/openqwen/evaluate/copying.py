"""How well a model copies: what it saves on a list of words that it has just read."""

import numpy as np
import torch

from openqwen.evaluate.bits_per_byte import Window, window_losses
from openqwen.model import Qwen2
from openqwen.tasks.checkable.words import WORDS
from openqwen.tokenizer import Tokenizer

_LISTS, _LENGTH = 32, 12  # of words


@torch.inference_mode()
def copying_scores(model: Qwen2, tokenizer: Tokenizer) -> dict[str, float]:
    """Read lists of random words twice, and compare the losses (Olsson et al. 2022).

    A model with induction heads saves nearly all of the loss on the second reading. One that saves
    little cannot answer from its prompt yet, and fine-tuning has to teach it that first.

    Returns:
        copying_saved: nats a token. copying_share: of the loss on the first reading.
    """
    rng = np.random.default_rng(0)
    lists = [rng.choice(WORDS, _LENGTH, replace=False) for _ in range(_LISTS)]
    ids = [tokenizer.encode("".join(f" {word}" for word in words)) for words in lists]
    tokens = [[tokenizer.endoftext_id, *once, *once] for once in ids]
    pack = [Window(each[:-1], each[1:], n) for n, each in enumerate(tokens)]
    losses = window_losses(model, pack, model.device)
    first = second = count = 0.0
    for part, once in zip(losses, ids):
        # Nothing says which word comes first.
        first += float(part[1 : len(once)].sum())
        second += float(part[len(once) + 1 :].sum())
        count += len(once) - 1
    return {"copying_saved": (first - second) / count, "copying_share": 1 - second / first}
