"""A network divided over ranks: tensor, expert and context parallel, and FSDP2 over the rest.

- tensor: q, k, v, gate and up are cut by columns, o and down by rows (Megatron, Shoeybi et al.
  2019).
- context: a rank holds a run of each row's tokens. Attention swaps tokens for heads and back
  (Ulysses, Jacobs et al. 2023), so each rank sees whole documents with its share of the heads.
  Every kind of attention, packed or in dual chunks, works unchanged, and the ranks' work is even.
- expert: a rank holds a share of each layer's experts; tokens travel to their experts and back.
- The rest (embedding, head, norms, router) is not cut. The ranks that hold the same tokens divide
  them (`token_parallel`), and FSDP2 shards the weights over all ranks. So `log_probs` scores the
  whole vocabulary on every rank, and no softmax over a cut vocabulary is needed.

Gradients are summed, not averaged, since those of the ranks are parts of one sum.
"""

from collections.abc import Callable, Mapping
from math import gcd
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from openqwen.model import Attention, ModelConfig, Qwen2, Routing, Scorer
from openqwen.model.decoder import Layer
from openqwen.model.experts import Experts, SparseFeedForward, mixture
from openqwen.model.lora import LoraLinear
from openqwen.model.rope import Rotation
from openqwen.model.stored import Reader, Stored
from openqwen.model.weights import read_block
from openqwen.support.errors import OpenQwenError
from openqwen.train.parallel.mesh import Mesh

Function = TypeVar("Function", bound=Callable[..., Tensor])


def shard(model: Qwen2 | Scorer, mesh: Mesh, low: bool = False) -> None:
    """Divide a network over the ranks of a mesh, in place.

    Args:
        model: All of it on every rank, or without memory and with its files (`model.stored`).
        mesh: The ranks.
        low: Gather the layers' weights in bfloat16, except the experts', whose gradient is computed
            in float32.
    """
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    if mesh.tensor.size() > 1:
        if any(isinstance(m, LoraLinear) for m in model.modules()):
            raise OpenQwenError(
                "Tensor parallel does not cut the matrices of adapters.",
                where="train.parallel.tensor",
                do="set it to 1",
            )
        for layer in layers:
            _tensor_parallel(layer, mesh.tensor)
        _token_parallel(model.model.embed_tokens, mesh.tensor)
        _token_parallel(model.model.norm, mesh.tensor)
    if mesh.context.size() > 1:
        _context_parallel(model.model, mesh.context)
    if isinstance(model, Scorer):
        _token_parallel(model.score, mesh.same_rows)
    for layer in layers:
        if isinstance(layer.mlp, SparseFeedForward):
            _expert_parallel(layer.mlp.experts, mesh.expert)
            _token_parallel(layer.mlp.experts, mesh.tensor)
            _fsdp(layer.mlp.experts, mesh.sparse)
        if low:  # the weights are gathered in bfloat16, so the activations must be rounded too
            layer.forward = torch.autocast(mesh.all.device_type, torch.bfloat16)(layer.forward)  # type: ignore[method-assign]
        _fsdp(layer, mesh.dense, torch.bfloat16 if low else None)
    _fsdp(model, mesh.world)
    if isinstance(model, Qwen2) and model.stored is not None:
        _read_shards(model, model.stored, torch.device(mesh.all.device_type))


def _fsdp(module: nn.Module, mesh: DeviceMesh, gathered: torch.dtype | None = None) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _read_shards(model: nn.Module, stored: Mapping[str, Stored], device: torch.device) -> None:
    """Give a sharded network memory and read this rank's shards, and nothing else, from files."""
    model.to_empty(device=device)
    with Reader() as reader:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local().detach()
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            if local.numel():
                read_block(reader, stored, name, parameter.shape, offset, local)


def token_parallel(function: Function, mesh: DeviceMesh | None) -> Function:
    """Divide the work of a row-wise function over the ranks of a mesh, which hold the same rows.

    Each rank computes a run of the rows, and all ranks get the result for every row. The backward
    pass gives each rank the whole gradient of the rows, and parameters the part of their gradient
    that comes from the rank's run.

    Args:
        function: Returns a row for each of its rows, or a scalar that is a sum over them.
        mesh: The ranks; None or one rank: `function` itself is returned.
    """
    if mesh is None or mesh.size() == 1:
        return function

    def parallel(*rows: Tensor) -> Tensor:
        result = function(*(_scatter_rows(x, mesh) for x in rows))
        if result.dim():
            return _gather_rows(result, mesh, len(rows[0]))
        return _as_sharded(result, mesh, Partial(), ()).full_tensor()

    return parallel  # type: ignore[return-value]


def _scatter_rows(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's run of rows that all ranks hold; the backward pass gathers the gradient."""
    rows = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return rows.redistribute(placements=[Shard(0)]).to_local()


def _gather_rows(x: Tensor, mesh: DeviceMesh, total: int) -> Tensor:
    """The runs of all ranks, `total` rows in order; the backward pass keeps this rank's run."""
    gathered = _as_sharded(x, mesh, Shard(0), (total, *x.shape[1:])).full_tensor()
    return gathered.clone()  # FSDP2 warns about a network that returns a view


def _as_sharded(
    x: Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]
) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _token_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    module.forward = token_parallel(module.forward, mesh)


def _tensor_parallel(layer: Layer, mesh: DeviceMesh) -> None:
    """Cut one layer's matrices by heads and widths; the router and the experts are not cut."""
    network = "mlp.shared_expert" if isinstance(layer.mlp, SparseFeedForward) else "mlp"
    others = () if isinstance(layer.mlp, SparseFeedForward) else (None,)
    copied = Replicate()
    plan = {
        "self_attn": PrepareModuleInput(
            input_layouts=(copied, None, None), desired_input_layouts=(copied, None, None)
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(),
        network: PrepareModuleInput(
            input_layouts=(copied, *others), desired_input_layouts=(copied, *others)
        ),
        **{f"{network}.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        f"{network}.down_proj": RowwiseParallel(),
    }
    parallelize_module(layer, mesh, plan, src_data_rank=None)


class _ContextParallelAttention:
    """Attention over `total` tokens of which each rank of a mesh holds a run.

    The ranks exchange tokens for heads before the attention, and back after it.
    """

    def __init__(self, attention: Attention, mesh: DeviceMesh, total: int):
        self._attention, self._mesh, self._total = attention, mesh, total

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`; T counts the tokens of all ranks."""
        return self._attention.rotation(positions_T, config)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`; T counts this rank's tokens."""
        # Where the ranks outnumber the key/value heads, several ranks get the same head.
        repeats = self._mesh.size() // gcd(self._mesh.size(), k_TKd.shape[1])
        if repeats > 1:
            k_TKd, v_TKd = k_TKd.repeat_interleave(repeats, 1), v_TKd.repeat_interleave(repeats, 1)
        q_THd, k_TKd, v_TKd = (self._exchange(x, Shard(0), Shard(1)) for x in (q_THd, k_TKd, v_TKd))
        out_THd = self._attention.attend(q_THd, k_TKd, v_TKd, rotation, layer)
        return self._exchange(out_THd, Shard(1), Shard(0))

    def _exchange(self, x: Tensor, now: Shard, then: Shard) -> Tensor:
        heads = x.shape[1] * (self._mesh.size() if now.dim == 1 else 1)
        sharded = _as_sharded(x, self._mesh, now, (self._total, heads, x.shape[2]))
        return sharded.redistribute(placements=[then]).to_local()


def _context_parallel(decoder: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank a run of a row's tokens in the decoder.

    Hidden states and routing are gathered behind it, so that they are those of all tokens.
    """
    forward = decoder.forward

    def parallel(
        tokens_T: Tensor, positions_T: Tensor, attention: Attention, routing: Routing | None = None
    ) -> Tensor:
        total = len(tokens_T)
        exchanged = _ContextParallelAttention(attention, mesh, total)
        local = None if routing is None else Routing()
        x_TD = forward(_scatter_rows(tokens_T, mesh), positions_T, exchanged, local)
        if routing is not None and local is not None:
            routing.probabilities += [_gather_rows(p, mesh, total) for p in local.probabilities]
            routing.chosen += [_gather_rows(c, mesh, total) for c in local.chosen]
        return _gather_rows(x_TD, mesh, total)

    decoder.forward = parallel


def _expert_parallel(experts: Experts, mesh: DeviceMesh) -> None:
    """Divide the experts of a layer over the ranks; tokens travel to their experts and back."""
    if mesh.size() == 1:
        return
    for name, parameter in list(experts.named_parameters()):
        local = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(local, requires_grad=parameter.requires_grad))
    group, ranks = mesh.get_group(), mesh.size()

    def forward(x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        gate_up, down = (
            cast(DTensor, p).to_local() for p in (experts.gate_up_proj, experts.down_proj)
        )
        # Pairs of a token and an expert (N = T · k), sorted by expert and so by rank.
        order_N = chosen_Tk.flatten().argsort(stable=True)
        counts_E = torch.bincount(chosen_Tk.flatten(), minlength=ranks * len(down))
        theirs_E = torch.empty_like(counts_E)
        torch.distributed.all_to_all_single(theirs_E, counts_E, group=group)
        sent, received = (c.view(ranks, -1).sum(1).tolist() for c in (counts_E, theirs_E))
        tokens_ND = x_TD[order_N // chosen_Tk.shape[1]]
        x_MD = all_to_all_single_autograd(tokens_ND, received, sent, group)
        # The M received pairs come rank by rank, and by expert within each rank.
        experts_E = torch.arange(len(down), device=x_TD.device).repeat(ranks)
        local_M = experts_E.repeat_interleave(theirs_E)
        y_MD = mixture(x_MD, x_MD.new_ones(len(x_MD), 1), gate_up, down, local_M[:, None])
        y_ND = all_to_all_single_autograd(y_MD, sent, received, group)
        numbers_N = torch.arange(len(order_N), device=x_TD.device)
        places_Tk = torch.empty_like(order_N).scatter_(0, order_N, numbers_N).view_as(chosen_Tk)
        return F.embedding_bag(places_Tk, y_ND, per_sample_weights=weights_Tk, mode="sum")

    experts.forward = forward  # type: ignore[method-assign]
