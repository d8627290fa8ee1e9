"""AdamW with moments in 8 bits (Dettmers et al. 2022), torchao's: a quarter of the memory of
moments in float32.

Blocks of 128 numbers share a scale. They lie within rows, so that codes and scales are sharded as
the weights are, and a training state holds both to the bit, whatever the number of ranks that reads
it.
"""

import importlib
import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError

BLOCK = 128  # numbers that share a scale; every published width is a multiple of it
BYTES = 2 * (1 + 4 / BLOCK)  # of both moments of a weight
_LEAST = 4_096  # torchao keeps tensors with fewer numbers in float32


def adamw8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit.

    It is compiled: without that a step takes ten times as long and holds far more memory.
    """
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # which of its GPU kernels are not for this machine is no news
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        library = importlib.import_module("torchao.optim")
    except ImportError:
        raise OpenQwenError(
            "8-bit AdamW is torchao's, which is not installed.",
            where="train.method",
            do=f"{pip_install('torchao')}, or choose adamw",
        ) from None
    return library.AdamW8bit(groups, **settings, block_size=BLOCK)


def in_blocks(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits: its rows are whole blocks, and every rank
    holds as many.
    """
    ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    even = own.numel() * ranks == parameter.numel()
    return parameter.dim() > 1 and even and own.numel() >= _LEAST and own.shape[-1] % BLOCK == 0


def parts(moment: Tensor) -> dict[str, Tensor]:
    """The codes and the scales (a row of them for each row) of a moment in 8 bits; they share its
    memory.
    """
    own: Any = moment.to_local() if isinstance(moment, DTensor) else moment
    if not hasattr(own, "codes"):
        return {}
    found = {"codes": own.codes, "scales": own.scale.view(*own.shape[:-1], own.shape[-1] // BLOCK)}
    if isinstance(moment, DTensor):
        found = {name: _as_sharded(part, moment) for name, part in found.items()}
    return found


def empty(parameter: Tensor, signed: bool) -> Tensor:
    """A moment in 8 bits for a parameter, all zero. signed: the mean gradient; else the mean
    squared one.
    """
    kind = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    moment = kind.zeros(own.shape, signed, BLOCK, own.device, own.dtype)
    return _as_sharded(moment, parameter) if isinstance(parameter, DTensor) else moment


def _as_sharded(own: Tensor, like: DTensor) -> DTensor:
    """A rank's part of a tensor with the rows of another, which is sharded so."""
    columns = like.shape[-1] * own.shape[-1] // like.to_local().shape[-1]
    shape = torch.Size((*like.shape[:-1], columns))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
