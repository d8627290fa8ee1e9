"""torchao's AdamW with moments in 8 bits (Dettmers et al. 2022), a quarter of float32's memory.

Blocks of 128 numbers share a scale. A block does not cross rows, so codes and scales are sharded as
the weights are, and a training state holds both to the bit for any number of ranks.
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
    """torchao's AdamW8bit; it is compiled, or a step would take ten times as long."""
    for name in ("torchao", "torch.utils._pytree"):  # warnings about kernels for other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        library = importlib.import_module("torchao.optim")
    except ImportError:
        raise OpenQwenError(
            "8-bit AdamW needs torchao, which is not installed.",
            where="train.method",
            do=f"{pip_install('torchao')}, or choose adamw",
        ) from None
    return library.AdamW8bit(groups, **settings, block_size=BLOCK)


def in_blocks(parameter: Tensor) -> bool:
    """Whether a parameter's moments can be in 8 bits.

    Its rows must be whole blocks, and all ranks must hold equally many of its elements.
    """
    ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
    local = _local(parameter)
    even = local.numel() * ranks == parameter.numel()
    return parameter.dim() > 1 and even and local.numel() >= _LEAST and local.shape[-1] % BLOCK == 0


def parts(moment: Tensor) -> dict[str, Tensor]:
    """The codes and the scales of a moment in 8 bits, which share its memory; else nothing."""
    local: Any = _local(moment)
    if not hasattr(local, "codes"):
        return {}
    scales = local.scale.view(*local.shape[:-1], local.shape[-1] // BLOCK)
    tensors = {"codes": local.codes, "scales": scales}
    if isinstance(moment, DTensor):
        tensors = {name: _as_sharded(tensor, moment) for name, tensor in tensors.items()}
    return tensors


def empty(parameter: Tensor, signed: bool) -> Tensor:
    """A moment in 8 bits, all zero. signed: for the mean gradient; else for the mean square."""
    state = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    local = _local(parameter)
    moment = state.zeros(local.shape, signed, BLOCK, local.device, local.dtype)
    return _as_sharded(moment, parameter) if isinstance(parameter, DTensor) else moment


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as_sharded(local: Tensor, like: DTensor) -> DTensor:
    """A tensor whose rows are sharded as those of another, from this rank's shard."""
    columns = like.shape[-1] * local.shape[-1] // like.to_local().shape[-1]
    shape = torch.Size((*like.shape[:-1], columns))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
