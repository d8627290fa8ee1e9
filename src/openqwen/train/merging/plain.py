"""The Online Merging Optimizer's arithmetic on one parameter in plain PyTorch, for any device.

Each line is a single operation on floats, in the order of native/merging.cpp, so both give the same
bits. Tensors are this rank's elements, [count], or the same selection of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["dare", "ties"]
Signs = Literal["weighted", "unweighted"]


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step of one parameter.

    scale: of the gradient. keep, new: weights of the old moments and of the gradient. rate, root,
    eps: AdamW's step is mean · rate / (√square · root + eps). decay: factor of the weights. factor:
    (1 − α), with 1/p where kept entries are scaled.
    """

    scale: float
    keep1: float
    new1: float
    keep2: float
    new2: float
    rate: float
    root: float
    eps: float
    decay: float
    factor: float
    alpha: float


def update_moments(mean: Tensor, square: Tensor, gradient: Tensor, numbers: StepNumbers) -> None:
    """AdamW's moments, in place."""
    gradient = gradient * numbers.scale
    mean.mul_(numbers.keep1).add_(gradient * numbers.new1)
    square.mul_(numbers.keep2).add_((gradient * gradient) * numbers.new2)


def adamw_step(mean: Tensor, square: Tensor, numbers: StepNumbers) -> Tensor:
    """d, AdamW's change of the weights without its decay."""
    # In float32, PyTorch's roots on a CPU are not the nearest numbers, which the kernel's are.
    root = square.double().sqrt().to(square.dtype)
    return (mean * numbers.rate) / (root * numbers.root + numbers.eps)


def merged(step: Tensor, task: Tensor, form: Form, signs: Signs, numbers: StepNumbers) -> Tensor:
    """(1 − α) F(d) ⊕ α F(τ) from the kept entries of the step and of the task vector."""
    a, b = step * numbers.factor, task * numbers.alpha
    if form == "dare":
        return a + b
    zero = torch.zeros((), dtype=step.dtype, device=step.device)
    if signs == "weighted":
        opposite = ((a < 0) & (b > 0)) | ((a > 0) & (b < 0))
        left, right = a.abs(), b.abs()
        larger = torch.where(left > right, a, torch.where(right > left, b, zero))
        return torch.where(opposite, larger, a + b)
    positive = step + task >= 0
    x = torch.where(torch.where(positive, a > 0, a < 0), a, zero)
    y = torch.where(torch.where(positive, b > 0, b < 0), b, zero)
    return x + y


def add(weights: Tensor, lost: Tensor, change: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weights + lost + change: the sum as `dtype` holds it, and what rounding lost (TwoSum)."""
    change = change + lost
    total = (weights + change).to(dtype).to(weights.dtype)
    part = total - weights
    return total, (weights - (total - part)) + (change - part)
