"""A language model with weights of 8 or 4 bits: half or a quarter of bfloat16's bytes, multiplied
as integers on a CPU.

Weights are signed numbers with a scale for each group of inputs (model/packed.py); activations
become signed bytes on the way into each matrix. Every output row is a function of its input row and
the weights alone, to the bit: what else is in the batch, and how many threads there are, never
shows. Matrices that read the same input are one (q, k and v; gate and up). The network is frozen,
but gradients flow through it to its input, so adapters can learn on top of it.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import c_int64, c_void_p
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model import kernels
from openqwen.model.attention import Attention
from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Decoder, Qwen2, RMSNorm
from openqwen.model.experts import Routing, SparseFeedForward, route
from openqwen.model.packed import FORMATS, choose, in_bytes, pack, rows_of, unpack
from openqwen.model.paged import Paged
from openqwen.model.rope import Rotation
from openqwen.model.weights import without_memory
from openqwen.support.errors import OpenQwenError

Kind = Literal["int8", "int4"]
Network = TypeVar("Network", bound=nn.Module)
Before = Callable[[Tensor], Tensor] | None  # an RMSNorm, `swiglu`, or nothing

# What stays in 8 bits in a network of 4: the embedding, of which a token reads one row; q, k and v,
# whose inputs and biases have outliers; and the feed-forward networks of the first sixth of the
# layers. In the 0.5B these last two cost
# 0.6 bits a weight and take the loss of perplexity from 7.4 % to 3.3 % (docs/log.md).
_CAREFUL: Kind = "int8"
_FIRST = 6  # one of so many layers
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# that pass through a feed-forward network at once: what lies between its matrices stays in the
# cache
_ROWS = 256


def swiglu(x_TJ: Tensor) -> Tensor:
    """silu(gate) · up of [T, gate and up]: [T, width]."""
    gate, up = x_TJ.chunk(2, dim=-1)
    return F.silu(gate) * up


class PackedMatrix(nn.Module):
    """[outputs, inputs] in packed form, with a bias perhaps. parts: names and outputs of what it
    was merged from.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, parts: Mapping[str, int], kind: Kind, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs, self.parts, self.form = (
            inputs,
            sum(parts.values()),
            dict(parts),
            FORMATS[kind],
        )
        self.register_buffer(
            "packed", torch.empty(self.form.shape(self.outputs, inputs), dtype=torch.uint8)
        )
        self.register_buffer("bias", torch.empty(self.outputs) if bias else None)
        self._call, self._called = torch.empty(0), (0, 0, cast(Before, None))

    @property
    def weight(self) -> Tensor:
        """The matrix in float32 [outputs, inputs], made anew."""
        return unpack(self.packed, self.form, self.outputs, self.inputs)

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        """Take the values of these matrices, one after the other."""
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        if weight.dtype not in _TYPES:
            weight = weight.float()
        if self.packed.is_meta:
            self.packed = torch.empty(self.packed.shape, dtype=torch.uint8)
        if self.bias is not None:
            self.bias = torch.cat(list(biases)).float()
        if kernel := kernels.function("openqwen_quantize", c_void_p, *[c_int64] * 4, c_void_p):
            kernels.follow_torch()
            sizes = (_TYPES[weight.dtype], *weight.shape, self.form.bits)
            kernel(weight.data_ptr(), *sizes, self.packed.data_ptr())
        else:
            self.packed.copy_(pack(*choose(weight, self.form), self.form))

    def times(
        self, x_TK: Tensor, before: Before = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        """residual + W before(x) + bias: [T, outputs]. Differentiable by x and the residual."""
        if not (torch.is_grad_enabled() and x_TK.requires_grad):
            return self._times(x_TK, before, residual_TN)
        y_TN = _Times.apply(x_TK if before is None else before(x_TK), self)
        return y_TN if residual_TN is None else residual_TN + y_TN

    def _times(self, x_TK: Tensor, before: Before, residual_TN: Tensor | None) -> Tensor:
        if (kernel := kernels.linear()) is None:
            x_TK = in_bytes(x_TK.float() if before is None else before(x_TK.float()), self.form)
            y_TN = F.linear(x_TK, self.weight, self.bias)
            return y_TN if residual_TN is None else residual_TN + y_TN
        if x_TK.dtype is not torch.float32 or not x_TK.is_contiguous():
            x_TK = x_TK.float().contiguous()
        if residual_TN is not None and not residual_TN.is_contiguous():
            residual_TN = residual_TN.contiguous()
        rows = x_TK.shape[0]
        out_TN = torch.empty(rows, self.outputs)
        residual = None if residual_TN is None else residual_TN.data_ptr()
        kernel(self._address(before), x_TK.data_ptr(), rows, residual, out_TN.data_ptr())
        return out_TN

    def _address(self, before: Before) -> int:
        """Of `struct Linear` in native/linear.cpp; made anew when memory moved."""
        # Each token asks a hundred times; past nn.Module's own lookup it costs a fifth.
        norm = before if isinstance(before, RMSNorm) else None
        weight = 0 if norm is None else cast(Tensor, norm._parameters["weight"]).data_ptr()
        called = (cast(Tensor, self._buffers["packed"]).data_ptr(), weight, before)
        if called != self._called:
            if {x.dtype for x in (self.bias, norm and norm.weight) if x is not None} - {
                torch.float32
            }:
                raise OpenQwenError(
                    "A quantised model was cast.", do="leave it in float32, which it computes in"
                )
            kind = 1 if norm is not None else 2 if before is swiglu else 0
            bias, eps = kernels.address(self.bias) or 0, 0.0 if norm is None else norm.eps
            values = (called[0], bias, weight, self.inputs, self.outputs, self.form.bits, kind, eps)
            self._call = torch.frombuffer(
                bytearray(struct.pack("=7qd", *values)), dtype=torch.int64
            ).clone()
            self._called = called
        return self._call.data_ptr()


class _Times(torch.autograd.Function):
    """W x + b with whole numbers, its gradient with the weights that they stand for."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix._times(x_TK.detach(), None, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix.weight, None


class QuantizedLinear(PackedMatrix):
    """A linear layer of packed weights; see `PackedMatrix.times`."""

    def forward(
        self, x_TK: Tensor, before: Before = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        """[T, inputs] → [T, outputs]."""
        return self.times(x_TK, before, residual_TN)


class QuantizedEmbedding(PackedMatrix):
    """A table of packed rows, which may be the output matrix as well."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Token ids [T] → their rows [T, D], float32."""
        kernel = kernels.function(
            "openqwen_rows", c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_void_p
        )
        if kernel is None:
            return rows_of(self.packed, self.form, tokens_T, self.inputs)
        kernels.follow_torch()
        if len(tokens_T) and not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < self.outputs:
            raise IndexError(f"token ids go from 0 to {self.outputs - 1}")
        tokens_T, out_TD = tokens_T.long().contiguous(), torch.empty(len(tokens_T), self.inputs)
        kernel(
            self.packed.data_ptr(),
            self.form.bits,
            self.inputs,
            tokens_T.data_ptr(),
            len(tokens_T),
            out_TD.data_ptr(),
        )
        return out_TD


class QuantizedFeedForward(nn.Module):
    """SwiGLU of two packed matrices."""

    def __init__(self, hidden_size: int, width: int, kind: Kind):
        super().__init__()
        self.gate_up_proj = QuantizedLinear(
            hidden_size, {"gate_proj": width, "up_proj": width}, kind
        )
        self.down_proj = QuantizedLinear(width, {"down_proj": hidden_size}, kind)

    def forward(
        self, x_TD: Tensor, before: Before = None, residual_TD: Tensor | None = None
    ) -> Tensor:
        """residual + down(swiglu(gate_up(before(x)))): [T, D]."""
        residuals = (
            [None] * -(-len(x_TD) // _ROWS) if residual_TD is None else residual_TD.split(_ROWS)
        )
        parts = [
            self.down_proj(self.gate_up_proj(x, before), swiglu, residual)
            for x, residual in zip(x_TD.split(_ROWS), residuals)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class QuantizedSparseFeedForward(nn.Module):
    """A mixture of experts (model/experts.py) of packed matrices; the router stays in float32."""

    def __init__(self, config: ModelConfig, kind: Kind):
        super().__init__()
        self.active, self.renormalised = config.num_experts_per_tok, config.norm_topk_prob
        width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
        self.experts = nn.ModuleList(
            QuantizedFeedForward(config.hidden_size, width, kind) for _ in range(config.num_experts)
        )
        self.shared_expert = QuantizedFeedForward(config.hidden_size, shared, kind)
        self.register_buffer(
            "gates", torch.empty(config.num_experts + 1, config.hidden_size)
        )  # the shared one's last

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """[T, D] → [T, D]; what the router decided goes into `routing`."""
        gates = self.get_buffer("gates")
        logits_TE = torch.stack(
            [gates.mv(x_D) for x_D in x_TD]
        )  # row by row: in a batch they would round otherwise
        weights_Tk, chosen_Tk = route(logits_TE[:, :-1], self.active, self.renormalised, routing)
        y_TkD = x_TD.new_zeros(*chosen_Tk.shape, x_TD.shape[1])
        for number in chosen_Tk.unique().tolist():
            token, place = (chosen_Tk == number).nonzero(as_tuple=True)
            y_TkD[token, place] = self.experts[number](x_TD[token])
        shared_TD = logits_TE[:, -1:].sigmoid() * self.shared_expert(x_TD)
        return (y_TkD * weights_Tk.unsqueeze(2)).sum(1) + shared_TD


class QuantizedLayer(nn.Module):
    """As `decoder.Layer`, with norms, activations and residuals passed to the matrices that they
    stand beside.
    """

    def __init__(self, config: ModelConfig, number: int, kind: Kind):
        super().__init__()
        width, self.number, head = config.hidden_size, number, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        parts = {
            "q_proj": self.heads * head,
            "k_proj": self.kv_heads * head,
            "v_proj": self.kv_heads * head,
        }
        self.input_layernorm = RMSNorm(config)
        self.qkv_proj = QuantizedLinear(width, parts, _CAREFUL, bias=True)
        self.o_proj = QuantizedLinear(width, {"o_proj": width}, kind)
        self.post_attention_layernorm = RMSNorm(config)
        within = _CAREFUL if number * _FIRST < config.num_hidden_layers else kind
        self.mlp = (
            QuantizedSparseFeedForward(config, within)
            if config.is_sparse(number)
            else QuantizedFeedForward(width, config.intermediate_size, within)
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """[T, D] → [T, D]."""
        heads_THd = self.qkv_proj(x_TD, self.input_layernorm).unflatten(
            1, (self.heads + 2 * self.kv_heads, -1)
        )
        q_THd, k_TKd, v_TKd = heads_THd.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        x_TD = self.o_proj(
            attention.attend(q_THd, k_TKd, v_TKd, rotation, self.number).flatten(1), None, x_TD
        )
        if isinstance(self.mlp, QuantizedSparseFeedForward):
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD), routing)
        return self.mlp(x_TD, self.post_attention_layernorm, x_TD)


class QuantizedDecoder(Decoder):
    """As `Decoder`. Over a compiled cache of pages, where no gradient is asked for, all layers are
    one compiled call: the same kernels in the same order, and so the same bits, without Python
    between them."""

    def through_layers(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """See `Decoder.through_layers`."""
        kernel = kernels.function("openqwen_layers", c_void_p, c_void_p, c_int64, c_void_p)
        plain = (
            kernel is None
            or not isinstance(attention, Paged)
            or (torch.is_grad_enabled() and x_TD.requires_grad)
        )
        matrices = [] if plain else self._matrices()
        call = cast(Paged, attention).compiled(rotation, len(x_TD)) if matrices else None
        if kernel is None or call is None:
            return super().through_layers(x_TD, rotation, attention, routing)
        x_TD = x_TD.clone(memory_format=torch.contiguous_format)
        layers = torch.tensor(matrices)
        kernel(call, layers.data_ptr(), len(self.layers), x_TD.data_ptr())
        return x_TD

    def _matrices(self) -> list[int]:
        """Each layer's `struct Layer` of native/layers.h; none where something else stands in a
        matrix's place.
        """
        found = []
        for layer in self.layers:
            own: Any = layer._modules
            mlp: Any = own["mlp"]
            if type(mlp) is not QuantizedFeedForward:
                return []
            pairs = (
                (own["qkv_proj"], own["input_layernorm"]),
                (own["o_proj"], None),
                (mlp._modules["gate_up_proj"], own["post_attention_layernorm"]),
                (mlp._modules["down_proj"], swiglu),
            )
            for matrix, before in pairs:
                if type(matrix) is not QuantizedLinear or matrix._forward_hooks:
                    return []
                found.append(matrix._address(before))
        return found


class QuantizedQwen2(Qwen2):
    """The language model in packed weights: float32 in between, on a CPU, frozen."""

    def __init__(self, config: ModelConfig, kind: Kind):
        nn.Module.__init__(self)
        self.config, self.kind = config, kind
        with without_memory():
            self.model = QuantizedDecoder(config)
            vocabulary = {"embed_tokens": config.vocab_size}
            self.model.embed_tokens = cast(
                Any, QuantizedEmbedding(config.hidden_size, vocabulary, _CAREFUL)
            )
            self.model.layers = nn.ModuleList(
                QuantizedLayer(config, n, kind) for n in range(config.num_hidden_layers)
            )
            shared = config.tie_word_embeddings and kind == _CAREFUL
            head = QuantizedLinear(config.hidden_size, {"lm_head": config.vocab_size}, kind)
        self.lm_head = cast(Any, None if shared else head)
        self.requires_grad_(False)

    def allocate(self) -> None:
        """Memory for all matrices in one piece, in the order in which a token reads them: in long
        runs over large pages a memory gives up to a third more bytes a second."""
        matrices = [module for module in self.modules() if isinstance(module, PackedMatrix)]
        memory = torch.empty(sum(matrix.packed.nbytes for matrix in matrices), dtype=torch.uint8)
        for matrix, piece in zip(
            matrices, memory.split([matrix.packed.nbytes for matrix in matrices])
        ):
            matrix.packed = piece.view(matrix.packed.shape)

    @property
    def _head(self) -> PackedMatrix:
        return cast(PackedMatrix, self.model.embed_tokens if self.lm_head is None else self.lm_head)

    @property
    def head_VD(self) -> Tensor:
        """The output matrix in float32, made anew: for training on top of it; `logits` reads the
        packed one.
        """
        return self._head.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """See `Qwen2.logits`."""
        return self._head.times(hidden_TD)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self._head.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """float32, of what flows between the matrices."""
        return torch.float32


def quantize(model: Qwen2, kind: Kind) -> QuantizedQwen2:
    """The same network with weights of 8 or 4 bits, in memory of its own: the source may be
    dropped.

    Raises OpenQwenError where the model is not on a CPU, or the kind is unknown.
    """
    check(kind, model.device)
    whole(model)
    quantized = QuantizedQwen2(model.config, kind)
    quantized.allocate()
    refresh(quantized, model)
    return quantized


def check(kind: str, device: torch.device) -> None:
    """Raise OpenQwenError where there is no such kind, or the device is not a CPU."""
    if kind not in FORMATS:
        raise OpenQwenError(
            f"Weights cannot be quantised to '{kind}'.", do=f"choose one of {', '.join(FORMATS)}"
        )
    if device.type != "cpu":
        raise OpenQwenError(
            f"Packed weights run on the CPU, not on {device}.",
            do='give device="cpu", or leave quantize out and give dtype="bfloat16"',
        )


def whole(model: Network) -> Network:
    """The model, if its weights are not quantised yet; OpenQwenError otherwise."""
    if isinstance(model, QuantizedQwen2):
        raise OpenQwenError(
            f"These weights are {model.kind} already; what they were is lost.",
            do="give the model they were made from",
        )
    return model


def refresh(quantized: QuantizedQwen2, source: Qwen2) -> None:
    """Quantise anew, in place, the weights of a source of the same shape, which a trainer has moved
    meanwhile.
    """
    for matrix, parts in _matrices(quantized, source):
        weights = [part if isinstance(part, Tensor) else part.weight for part in parts]
        layers = [part for part in parts if not isinstance(part, Tensor)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        matrix.fill(weights, biases)
    modules = dict(quantized.named_modules())
    for name, module in source.named_modules():
        if isinstance(module, RMSNorm):
            modules[name].weight = nn.Parameter(
                module.weight.detach().float().clone(), requires_grad=False
            )
        if isinstance(module, SparseFeedForward):
            gates = (
                torch.cat([module.gate.weight, module.shared_expert_gate.weight]).detach().float()
            )
            modules[name].register_buffer("gates", gates)


def _matrices(
    quantized: QuantizedQwen2, source: Qwen2
) -> Iterator[tuple[PackedMatrix, Sequence[nn.Linear | Tensor]]]:
    """Each packed matrix and the parts of the source that it is merged from."""
    yield cast(Any, quantized.model.embed_tokens), [source.model.embed_tokens.weight]
    if quantized.lm_head is not None:
        yield quantized._head, [source.head_VD]
    pairs: Iterable[tuple[Any, Any]] = zip(quantized.model.layers, source.model.layers)
    for layer, plain in pairs:
        attention, networks = plain.self_attn, [(layer.mlp, plain.mlp)]
        yield layer.qkv_proj, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.o_proj, [attention.o_proj]
        if isinstance(plain.mlp, SparseFeedForward):
            networks = [(layer.mlp.shared_expert, plain.mlp.shared_expert)]
            experts = plain.mlp.experts
            for expert, gate_up, down in zip(
                layer.mlp.experts, experts.gate_up_proj, experts.down_proj
            ):
                yield expert.gate_up_proj, [gate_up]
                yield expert.down_proj, [down]
        for mine, theirs in networks:
            yield mine.gate_up_proj, [theirs.gate_proj, theirs.up_proj]
            yield mine.down_proj, [theirs.down_proj]


def bits_per_weight(quantized: QuantizedQwen2) -> float:
    """Of what one decoded token reads: every matrix and scale, without the embedding table unless
    it is the output.
    """
    matrices = [
        m for m in quantized.modules() if isinstance(m, QuantizedLinear) or m is quantized._head
    ]
    return 8 * sum(m.packed.nbytes for m in matrices) / sum(m.inputs * m.outputs for m in matrices)
