"""Small functions of the network as one kernel each on a GPU, made by PyTorch's compiler.

Without it a norm or a rotation is a chain of kernels that each take longer to start than to run;
with it a decoding step of a small network takes a third of the time.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


@cache
def _has_triton() -> bool:
    """Whether PyTorch's compiler can make kernels for a GPU."""
    return find_spec("triton") is not None


def fused(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Return `function`, compiled where its first argument is on CUDA and nothing is trained.

    Training has its own compiler, for whole layers. The compiled function rounds to half precision
    once, at its end, where plain PyTorch rounds after each operation.
    """
    # Compiled at the first use: importing PyTorch's compiler takes more than a second.
    compiled = cache(lambda: torch.compile(function))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        x = args[0]
        plain = not isinstance(x, Tensor) or not x.is_cuda
        if plain or torch.is_grad_enabled() or torch.compiler.is_compiling() or not _has_triton():
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call
