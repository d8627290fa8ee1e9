"""A network divided over ranks: tensor, expert and context parallel, and FSDP2 over what they leave
whole.

- tensor: q, k, v, gate and up are cut by columns, o and down by rows (Megatron, Shoeybi et al.
2019).
- context: a rank holds a run of each row's tokens; attention swaps tokens for heads and back
(Ulysses, Jacobs et al.
  2023), so that each rank reads whole documents with its share of the heads. Every attention works
  as it is, packed and in dual chunks, and the ranks' work is even.
- expert: a rank holds a share of each layer's experts; tokens travel to their experts and back.
- The rest (embedding, head, norms, router) is not cut. The ranks that hold the same tokens divide
  them (`token_parallel`), and FSDP2 shards the weights over all ranks. So `log_probs` scores the
  whole vocabulary on every rank, and no softmax over a cut vocabulary is needed.

Gradients are summed, not averaged, since the parts of a gradient on all ranks are parts of one sum.
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
    """Divide the network over the ranks of a mesh, in place. Every rank holds all of it before.

    low: the layers' weights are gathered in bfloat16, but for the experts, whose gradient is
    computed in float32.
    """
    layers = [m for m in model.modules() if isinstance(m, Layer)]
    if mesh.tensor.size() > 1:
        if any(isinstance(m, LoraLinear) for m in model.modules()):
            raise OpenQwenError(
                "Adapters are small; their matrices are not cut.",
                where="train.parallel.tensor",
                do="set it to 1",
            )
        for layer in layers:
            _cut_matrices(layer, mesh.tensor)
        _deal(model.model.embed_tokens, mesh.tensor)
        _deal(model.model.norm, mesh.tensor)
    if mesh.context.size() > 1:
        _spread(model.model, mesh.context)
    if isinstance(model, Scorer):
        _deal(model.score, mesh.same_rows)
    for layer in layers:
        if isinstance(layer.mlp, SparseFeedForward):
            _send_tokens(layer.mlp.experts, mesh.expert)
            _deal(layer.mlp.experts, mesh.tensor)
            _fsdp(layer.mlp.experts, mesh.sparse)
        if low:  # its weights come rounded, so its products must take rounded activations
            layer.forward = torch.autocast(mesh.whole.device_type, torch.bfloat16)(layer.forward)  # type: ignore[method-assign]
        _fsdp(layer, mesh.dense, torch.bfloat16 if low else None)
    _fsdp(model, mesh.world)
    if isinstance(model, Qwen2) and model.stored is not None:
        _read_own(model, model.stored, torch.device(mesh.whole.device_type))


def _fsdp(module: nn.Module, mesh: DeviceMesh, gathered: torch.dtype | None = None) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _read_own(model: nn.Module, stored: Mapping[str, Stored], device: torch.device) -> None:
    """Give a network without memory its shards, each rank reading only its own from the files."""
    model.to_empty(device=device)
    with Reader() as reader:
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local().detach()
            place = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            if local.numel():
                read_block(reader, stored, name, parameter.shape, place[1], local)


def token_parallel(function: Function, mesh: DeviceMesh | None) -> Function:
    """A function of rows, where the ranks of a mesh hold the same: each works on its share, all get
    the whole result.

    It gives a row for each of its rows, or one number that is a sum over them. In the backward pass
    the rows get their whole gradient, and parameters inside the part of it from this rank's rows.
    """
    if mesh is None or mesh.size() == 1:
        return function

    def shared(*rows: Tensor) -> Tensor:
        found = function(*(part(x, mesh) for x in rows))
        return (
            whole(found, mesh, len(rows[0]))
            if found.dim()
            else _sharded(found, mesh, Partial(), ()).full_tensor()
        )

    return shared  # type: ignore[return-value]


def part(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's run of rows that all ranks of a mesh hold; the gradient is gathered."""
    return (
        DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        .redistribute(placements=[Shard(0)])
        .to_local()
    )


def whole(x: Tensor, mesh: DeviceMesh, rows: int) -> Tensor:
    """All ranks' runs of `rows` rows in order, on each of them; of the gradient, which all hold,
    each keeps its run.
    """
    gathered = _sharded(x, mesh, Shard(0), (rows, *x.shape[1:])).full_tensor()
    return gathered.clone()  # FSDP2 warns of a network that returns a view


def _sharded(x: Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _deal(module: nn.Module, mesh: DeviceMesh) -> None:
    module.forward = token_parallel(module.forward, mesh)


def _cut_matrices(layer: Layer, mesh: DeviceMesh) -> None:
    """Heads and widths of one layer to the ranks; the router and the experts stay."""
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


class _Spread:
    """Attention whose tokens stand on the ranks of a mesh in runs: the ranks swap them for heads,
    and back.
    """

    def __init__(self, rows: Attention, mesh: DeviceMesh, total: int):
        self._rows, self._mesh, self._total = rows, mesh, total

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """Of all tokens: see `Attention.rotation`."""
        return self._rows.rotation(positions_T, config)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`; T counts this rank's tokens."""
        # Fewer key/value heads than ranks: some ranks get the same.
        repeats = self._mesh.size() // gcd(self._mesh.size(), k_TKd.shape[1])
        k_TKd, v_TKd = (
            x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k_TKd, v_TKd)
        )
        q_THd, k_TKd, v_TKd = (self._swapped(x, Shard(0), Shard(1)) for x in (q_THd, k_TKd, v_TKd))
        out_THd = self._rows.attend(q_THd, k_TKd, v_TKd, rotation, layer)
        return self._swapped(out_THd, Shard(1), Shard(0))

    def _swapped(self, x: Tensor, now: Shard, then: Shard) -> Tensor:
        heads = x.shape[1] * (self._mesh.size() if now.dim == 1 else 1)
        sharded = _sharded(x, self._mesh, now, (self._total, heads, x.shape[2]))
        return sharded.redistribute(placements=[then]).to_local()


def _spread(decoder: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank a run of every row's tokens below the head; hidden states and routing come out
    whole.
    """
    forward = decoder.forward

    def spread(
        tokens_T: Tensor, positions_T: Tensor, attention: Attention, routing: Routing | None = None
    ) -> Tensor:
        total = len(tokens_T)
        own = None if routing is None else Routing()
        x_TD = forward(part(tokens_T, mesh), positions_T, _Spread(attention, mesh, total), own)
        if routing is not None and own is not None:
            routing.probabilities += [whole(p_TE, mesh, total) for p_TE in own.probabilities]
            routing.chosen += [whole(chosen_Tk, mesh, total) for chosen_Tk in own.chosen]
        return whole(x_TD, mesh, total)

    decoder.forward = spread


def _send_tokens(experts: Experts, mesh: DeviceMesh) -> None:
    """Deal the experts of a layer to the ranks; tokens are sent to them, and their answers come
    back.
    """
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
        order_N = chosen_Tk.flatten().argsort(
            stable=True
        )  # pairs of a token and an expert, by expert
        counts_E = torch.bincount(chosen_Tk.flatten(), minlength=ranks * len(down))
        theirs_E = torch.empty_like(counts_E)
        torch.distributed.all_to_all_single(theirs_E, counts_E, group=group)
        sent, received = (c.view(ranks, -1).sum(1).tolist() for c in (counts_E, theirs_E))
        x_MD = all_to_all_single_autograd(
            x_TD[order_N // chosen_Tk.shape[1]], received, sent, group
        )
        local_M = (
            torch.arange(len(down), device=x_TD.device).repeat(ranks).repeat_interleave(theirs_E)
        )
        y_MD = mixture(x_MD, x_MD.new_ones(len(x_MD), 1), gate_up, down, local_M[:, None])
        y_ND = all_to_all_single_autograd(y_MD, sent, received, group)
        places_Tk = torch.empty_like(order_N).scatter_(
            0, order_N, torch.arange(len(order_N), device=x_TD.device)
        )
        return F.embedding_bag(
            places_Tk.view_as(chosen_Tk), y_ND, per_sample_weights=weights_Tk, mode="sum"
        )

    experts.forward = forward  # type: ignore[method-assign]
