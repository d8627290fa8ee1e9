"""Several answers to one prompt in one row: the prompt is computed once.

A group of a prompt (p), two answers to it (a, b), and its targets:

    row          0   1   2   3   4   5   6
    token        p0  p1  p2  a0  a1  b0  b1      the last token of an answer (a2, b2) is not fed
    position     0   1   2   3   4   3   4       each answer continues the prompt
    predicts             a0  a1  a2  b1  b2
                         b0                      row 2 predicts the first token of both answers

    attention    p0  p1  p2  a0  a1  b0  b1
           p2    x   x   x
           a1    x   x   x   x   x               an answer sees the prompt and itself,
           b1    x   x   x           x   x       not the answers beside it

Log-probabilities and gradients are those of separate rows. An answer of five tokens to a prompt of
thirty-five costs a tenth of what it costs with a prompt of its own.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.model import ModelConfig
from openqwen.model.rope import Rotation, rotate, rotation_of
from openqwen.support.errors import OpenQwenError
from openqwen.train.packed_batch import PackedBatch

PromptAnswers = tuple[Sequence[int], Sequence[Sequence[int]]]  # the ids of a prompt and its answers


class SharedPromptAttention:
    """Attention over groups laid end to end, each a prompt and then the answers to it.

    Groups are padded to one length for the call: B groups of at most L tokens. Other shapes are
    those of `model.attention`.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]):
        """groups: the number of tokens of each prompt, and of each answer to it."""
        self._totals = [prompt + sum(answers) for prompt, answers in groups]
        self._lengths = [prompt + max(answers) for prompt, answers in groups]
        totals = torch.tensor(self._totals)
        width = int(totals.max())
        starts_B1 = (totals.cumsum(0) - totals)[:, None]
        steps_L = torch.arange(width)
        # Padding repeats a group's last token. No real token sees it, as it comes after them all.
        self._rows_BL = starts_B1 + torch.minimum(steps_L, totals[:, None] - 1)
        self._real_BL = steps_L < totals[:, None]
        owner_BL = torch.zeros(len(groups), width, dtype=torch.long)  # 0: prompt, 1: first answer …
        for row, (prompt, answers) in zip(owner_BL, groups):
            starts = accumulate(answers, initial=prompt)
            for number, (start, length) in enumerate(zip(starts, answers), 1):
                row[start : start + length] = number
        same_BLL = (owner_BL[:, :, None] == owner_BL[:, None]) | (owner_BL[:, None] == 0)
        self._mask_B1LL = (same_BLL & (steps_L[:, None] >= steps_L))[:, None]

    def to(self, device: torch.device | str) -> "SharedPromptAttention":
        """Move the indices; returns self."""
        self._rows_BL, self._real_BL = self._rows_BL.to(device), self._real_BL.to(device)
        self._mask_B1LL = self._mask_B1LL.to(device)
        return self

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `model.Attention.rotation`. A group is as long as its prompt and longest answer."""
        rotation = rotation_of(
            positions_T, config, [None] * len(self._totals), self._totals, self._lengths
        )
        if any(rotation.chunk_lens):
            raise OpenQwenError(
                f"Answers that share a prompt have {max(self._lengths)} tokens with it, which do"
                " not fit in one chunk of Dual Chunk Attention.",
                do="lower max_length",
            )
        return rotation

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """The attention's output for every token, [T, H, d]; scale 1/√d."""
        rotated = (rotate(q_THd, *rotation.query), rotate(k_TKd, *rotation.key), v_TKd)
        q, k, v = (x[self._rows_BL].transpose(1, 2) for x in rotated)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask_B1LL, enable_gqa=q_THd.shape[1] != k_TKd.shape[1]
        )
        return out.transpose(1, 2)[self._real_BL]


def pack_answers(
    groups: Sequence[PromptAnswers], device: torch.device | str = "cpu"
) -> PackedBatch:
    """Pack groups into one micro-batch; its documents are the answers, in order."""
    tokens: list[int] = []
    positions: list[int] = []
    learned: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for prompt, answers in groups:
        last = len(tokens) + len(prompt) - 1
        tokens += prompt
        positions += range(len(prompt))
        for answer in answers:
            # The prompt's last token predicts the first token of each answer.
            learned += [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
            targets += answer
            counts.append(len(answer))
            tokens += answer[:-1]
            positions += range(len(prompt), len(prompt) + len(answer) - 1)
    lengths = [(len(prompt), [len(answer) - 1 for answer in answers]) for prompt, answers in groups]
    return PackedBatch(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        attention=SharedPromptAttention(lengths).to(device),
        learned=torch.tensor(learned, device=device),
        targets=torch.tensor(targets, device=device),
        counts=counts,
    )
