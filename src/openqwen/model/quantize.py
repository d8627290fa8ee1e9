"""Language models with weights of 8 or 4 bits, multiplied as integers on a CPU.

They take half or a quarter of bfloat16's memory. Weights are integers with one scale for each group
of inputs (model/packed.py); activations are rounded to signed bytes on the way into each matrix. An
output row depends on its input row and the weights alone, to the bit: not on the rest of the batch,
nor on the number of threads. Matrices that read the same input are merged into one (q, k and v;
gate and up). The network is frozen, but gradients flow through it to its input, so that adapters
can learn on top of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import addressof, c_int64, c_void_p
from typing import Any, TypeVar, cast

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
from openqwen.model.structs import NO_TRANSFORM, RMS_NORM, SWIGLU, LayerCall, LinearCall
from openqwen.model.weights import without_memory
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Quantization

Network = TypeVar("Network", bound=nn.Module)
# What a matrix does to its input first: an RMSNorm, `swiglu`, or None for nothing.
Transform = Callable[[Tensor], Tensor] | None

# A network of 4 bits keeps some matrices in 8: the embedding, of which a token reads one row; q, k
# and v, whose inputs and biases have outliers; and the feed-forward networks of the first sixth of
# the layers. In the 0.5B the last two cost 0.6 bits a weight and reduce the increase of perplexity
# from 7.4 % to 3.3 % (docs/log.md).
_CAREFUL: Quantization = "int8"
_CAREFUL_LAYERS = 6  # one layer in so many, the first ones
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # their numbers in quantize.cpp
# Rows that pass through a feed-forward network at once, so that what lies between its matrices
# stays in the processor's cache. native/layers.cpp has the same number.
_ROWS = 256


def swiglu(x_TJ: Tensor) -> Tensor:
    """silu(gate) · up. Input [T, 2 · width], the gate first; output [T, width]."""
    gate, up = x_TJ.chunk(2, dim=-1)
    return F.silu(gate) * up


class PackedMatrix(nn.Module):
    """A matrix [outputs, inputs] in packed form, with an optional bias.

    Args:
        inputs: number of inputs.
        parts: name and number of outputs of each matrix that this one is merged from, in order.
        kind: "int8" or "int4".
        bias: whether there is one.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, inputs: int, parts: Mapping[str, int], kind: Quantization, bias: bool = False
    ):
        super().__init__()
        self.inputs, self.outputs = inputs, sum(parts.values())
        self.parts, self.form = dict(parts), FORMATS[kind]
        shape = self.form.shape(self.outputs, inputs)
        self.register_buffer("packed", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("bias", torch.empty(self.outputs) if bias else None)
        # The structure for the kernel, and the addresses and transform that it was filled from.
        self._call, self._filled_from = LinearCall(), (0, 0, cast(Transform, None))

    @property
    def weight(self) -> Tensor:
        """The matrix unpacked to float32, [outputs, inputs]; a new tensor at each access."""
        return unpack(self.packed, self.form, self.outputs, self.inputs)

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        """Quantise the concatenation of these matrices [.., inputs] and biases into this one."""
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        if weight.dtype not in _TYPES:
            weight = weight.float()
        if self.packed.is_meta:
            self.packed = torch.empty(self.packed.shape, dtype=torch.uint8)
        if self.bias is not None:
            self.bias = torch.cat(list(biases)).float()
            self._filled_from = (0, 0, None)  # the bias has moved
        if kernel := kernels.function("openqwen_quantize", c_void_p, *[c_int64] * 4, c_void_p):
            kernels.follow_torch()
            sizes = (_TYPES[weight.dtype], *weight.shape, self.form.bits)
            kernel(weight.data_ptr(), *sizes, self.packed.data_ptr())
        else:
            self.packed.copy_(pack(*choose(weight, self.form), self.form))

    def times(
        self, x_TK: Tensor, transform: Transform = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        """residual + W transform(x) + bias, [T, outputs], differentiable by x and the residual."""
        if not (torch.is_grad_enabled() and x_TK.requires_grad):
            return self._times(x_TK, transform, residual_TN)
        y_TN = _Times.apply(x_TK if transform is None else transform(x_TK), self)
        return y_TN if residual_TN is None else residual_TN + y_TN

    def _times(self, x_TK: Tensor, transform: Transform, residual_TN: Tensor | None) -> Tensor:
        if (kernel := kernels.linear()) is None:
            x_TK = x_TK.float() if transform is None else transform(x_TK.float())
            x_TK = in_bytes(x_TK, self.form)
            y_TN = F.linear(x_TK, self.weight, self.bias)
            return y_TN if residual_TN is None else residual_TN + y_TN
        if x_TK.dtype is not torch.float32 or not x_TK.is_contiguous():
            x_TK = x_TK.float().contiguous()
        if residual_TN is not None and not residual_TN.is_contiguous():
            residual_TN = residual_TN.contiguous()
        rows = x_TK.shape[0]
        out_TN = torch.empty(rows, self.outputs)
        residual = kernels.address(residual_TN)
        kernel(self.call(transform), x_TK.data_ptr(), rows, residual, out_TN.data_ptr())
        return out_TN

    def call(self, transform: Transform) -> int:
        """The address of this matrix's `LinearCall`, which is filled again where memory moved."""
        # A decoded token asks a hundred times. Reading _buffers and _parameters directly takes a
        # fifth of the time of nn.Module's attribute lookup.
        norm = transform if isinstance(transform, RMSNorm) else None
        weight = 0 if norm is None else cast(Tensor, norm._parameters["weight"]).data_ptr()
        fill_from = (cast(Tensor, self._buffers["packed"]).data_ptr(), weight, transform)
        if fill_from != self._filled_from:
            dtypes = {x.dtype for x in (self.bias, norm and norm.weight) if x is not None}
            if dtypes - {torch.float32}:
                raise OpenQwenError(
                    "A quantised model was cast to another dtype.",
                    do="leave it in float32, in which it computes",
                )
            self._call = LinearCall(
                packed=fill_from[0],
                bias=kernels.address(self.bias),
                norm=weight,
                inputs=self.inputs,
                outputs=self.outputs,
                bits=self.form.bits,
                transform=RMS_NORM if norm else SWIGLU if transform is swiglu else NO_TRANSFORM,
                eps=norm.eps if norm else 0.0,
            )
            self._filled_from = fill_from
        return addressof(self._call)


class _Times(torch.autograd.Function):
    """W x + bias, multiplied as integers; the gradient is that of the unpacked float32 matrix."""

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
        self, x_TK: Tensor, transform: Transform = None, residual_TN: Tensor | None = None
    ) -> Tensor:
        """[T, inputs] → [T, outputs]."""
        return self.times(x_TK, transform, residual_TN)


class QuantizedEmbedding(PackedMatrix):
    """A table of packed rows. It may be the output matrix too."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Token ids [T] → rows [T, D], float32. Raises IndexError for ids outside the table."""
        if len(tokens_T) and not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < self.outputs:
            raise IndexError(f"token ids go from 0 to {self.outputs - 1}")
        kernel = kernels.function(
            "openqwen_rows", c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_void_p
        )
        if kernel is None:
            return rows_of(self.packed, self.form, tokens_T, self.inputs)
        kernels.follow_torch()
        tokens_T, count = tokens_T.long().contiguous(), len(tokens_T)
        out_TD = torch.empty(count, self.inputs)
        table = (self.packed.data_ptr(), self.form.bits, self.inputs)
        kernel(*table, tokens_T.data_ptr(), count, out_TD.data_ptr())
        return out_TD


class QuantizedFeedForward(nn.Module):
    """The SwiGLU feed-forward network with two packed matrices."""

    def __init__(self, hidden_size: int, width: int, kind: Quantization):
        super().__init__()
        gate_up = {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = QuantizedLinear(hidden_size, gate_up, kind)
        self.down_proj = QuantizedLinear(width, {"down_proj": hidden_size}, kind)

    def forward(
        self, x_TD: Tensor, transform: Transform = None, residual_TD: Tensor | None = None
    ) -> Tensor:
        """residual + down(swiglu(gate_up(transform(x)))), [T, D]."""
        parts = []
        for first in range(0, len(x_TD), _ROWS):
            residual = None if residual_TD is None else residual_TD[first : first + _ROWS]
            inner = self.gate_up_proj(x_TD[first : first + _ROWS], transform)
            parts.append(self.down_proj(inner, swiglu, residual))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class QuantizedSparseFeedForward(nn.Module):
    """A mixture of experts (model/experts.py) with packed matrices; the router stays in float32."""

    def __init__(self, config: ModelConfig, kind: Quantization):
        super().__init__()
        self.active, self.renormalised = config.num_experts_per_tok, config.norm_topk_prob
        width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
        self.experts = nn.ModuleList(
            QuantizedFeedForward(config.hidden_size, width, kind) for _ in range(config.num_experts)
        )
        self.shared_expert = QuantizedFeedForward(config.hidden_size, shared, kind)
        # The router's rows, and last the gate of the shared expert.
        self.register_buffer("gates", torch.empty(config.num_experts + 1, config.hidden_size))

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """[T, D] → [T, D]; the router's decisions are appended to `routing`."""
        gates = self.get_buffer("gates")
        # One product for each row: in one for all, a row's rounding would depend on their number.
        logits_TE = torch.stack([gates.mv(x_D) for x_D in x_TD])
        weights_Tk, chosen_Tk = route(logits_TE[:, :-1], self.active, self.renormalised, routing)
        y_TkD = x_TD.new_zeros(*chosen_Tk.shape, x_TD.shape[1])
        for number in chosen_Tk.unique().tolist():
            token, place = (chosen_Tk == number).nonzero(as_tuple=True)
            y_TkD[token, place] = self.experts[number](x_TD[token])
        shared_TD = logits_TE[:, -1:].sigmoid() * self.shared_expert(x_TD)
        return (y_TkD * weights_Tk.unsqueeze(2)).sum(1) + shared_TD


class QuantizedLayer(nn.Module):
    """As `decoder.Layer`; the matrices compute the norms, activations and residuals beside them."""

    def __init__(self, config: ModelConfig, number: int, kind: Quantization):
        super().__init__()
        width, self.number, head = config.hidden_size, number, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        kv_width = self.kv_heads * head
        parts = {"q_proj": self.heads * head, "k_proj": kv_width, "v_proj": kv_width}
        self.input_layernorm = RMSNorm(config)
        self.qkv_proj = QuantizedLinear(width, parts, _CAREFUL, bias=True)
        self.o_proj = QuantizedLinear(width, {"o_proj": width}, kind)
        self.post_attention_layernorm = RMSNorm(config)
        within = _CAREFUL if number * _CAREFUL_LAYERS < config.num_hidden_layers else kind
        self.mlp = (
            QuantizedSparseFeedForward(config, within)
            if config.is_sparse(number)
            else QuantizedFeedForward(width, config.intermediate_size, within)
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """[T, D] → [T, D]."""
        counts = [self.heads, self.kv_heads, self.kv_heads]
        heads_THd = self.qkv_proj(x_TD, self.input_layernorm).unflatten(1, (sum(counts), -1))
        q_THd, k_TKd, v_TKd = heads_THd.split(counts, dim=1)
        attended_THd = attention.attend(q_THd, k_TKd, v_TKd, rotation, self.number)
        x_TD = self.o_proj(attended_THd.flatten(1), None, x_TD)
        if isinstance(self.mlp, QuantizedSparseFeedForward):
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD), routing)
        return self.mlp(x_TD, self.post_attention_layernorm, x_TD)


class QuantizedDecoder(Decoder):
    """As `Decoder`, with one compiled call for all layers where that is possible.

    It needs a paged cache that the kernels read, and no gradient. The call runs the same kernels in
    the same order as the layers one by one, so the bits are the same.
    """

    _layer_calls: tuple[list[int], Any] = ([], None)  # the addresses, and the array made of them

    def through_layers(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """See `Decoder.through_layers`."""
        kernel = kernels.function("openqwen_layers", c_void_p, c_void_p, c_int64, c_void_p)
        differentiable = torch.is_grad_enabled() and x_TD.requires_grad
        call = layers = None
        if kernel and isinstance(attention, Paged) and not differentiable:
            layers = self._calls()
            call = attention.compiled(rotation, len(x_TD)) if layers else None
        if kernel is None or call is None:
            return super().through_layers(x_TD, rotation, attention, routing)
        x_TD = x_TD.clone(memory_format=torch.contiguous_format)
        kernel(call, layers, len(self.layers), x_TD.data_ptr())
        return x_TD

    def _calls(self) -> int | None:
        """The address of an array of each layer's `LayerCall`.

        None where a layer has anything but plain packed matrices: experts, an adapter, a hook.
        """
        addresses = []
        for layer in self.layers:
            modules: Any = layer._modules
            mlp: Any = modules["mlp"]
            if type(mlp) is not QuantizedFeedForward:
                return None
            pairs = (
                (modules["qkv_proj"], modules["input_layernorm"]),
                (modules["o_proj"], None),
                (mlp._modules["gate_up_proj"], modules["post_attention_layernorm"]),
                (mlp._modules["down_proj"], swiglu),
            )
            for matrix, transform in pairs:
                if type(matrix) is not QuantizedLinear or matrix._forward_hooks:
                    return None
                addresses.append(matrix.call(transform))
        # Addresses rarely change, so the array of the last call usually serves again.
        if addresses != self._layer_calls[0]:
            array = (LayerCall * len(self.layers))()
            for number, call in enumerate(array):
                call.qkv, call.o, call.gate_up, call.down = addresses[4 * number : 4 * number + 4]
            self._layer_calls = addresses, array
        return addressof(self._layer_calls[1])


class QuantizedQwen2(Qwen2):
    """The language model with packed weights: on a CPU, frozen, float32 between the matrices."""

    def __init__(self, config: ModelConfig, kind: Quantization):
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
        """Give all matrices memory in one piece, in the order in which a token reads them.

        Main memory delivers up to a third more bytes a second in long runs over large pages.
        """
        matrices = [module for module in self.modules() if isinstance(module, PackedMatrix)]
        sizes = [matrix.packed.nbytes for matrix in matrices]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        for matrix, piece in zip(matrices, memory.split(sizes)):
            matrix.packed = piece.view(matrix.packed.shape)

    @property
    def _head(self) -> PackedMatrix:
        return cast(PackedMatrix, self.model.embed_tokens if self.lm_head is None else self.lm_head)

    @property
    def head_VD(self) -> Tensor:
        """The output matrix unpacked to float32, for training on top; `logits` reads it packed."""
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
        """float32, the type of hidden states, keys and values."""
        return torch.float32


def quantize(model: Qwen2, kind: Quantization) -> QuantizedQwen2:
    """The same network with weights of 8 or 4 bits, in new memory.

    Raises OpenQwenError where the model is not on a CPU or is quantised already, or the kind is
    unknown.
    """
    check(kind, model.device)
    refuse_quantized(model)
    quantized = QuantizedQwen2(model.config, kind)
    quantized.allocate()
    refresh(quantized, model)
    return quantized


def check(kind: str, device: torch.device) -> None:
    """Raise OpenQwenError where the kind is unknown or the device is not a CPU."""
    if kind not in FORMATS:
        raise OpenQwenError(
            f"Weights cannot be quantised to '{kind}'.", do=f"choose one of {', '.join(FORMATS)}"
        )
    if device.type != "cpu":
        raise OpenQwenError(
            f"Packed weights run on the CPU, not on {device}.",
            do='give device="cpu", or leave quantize out and give dtype="bfloat16"',
        )


def refuse_quantized(model: Network) -> Network:
    """Return the model; OpenQwenError where its weights are quantised."""
    if isinstance(model, QuantizedQwen2):
        raise OpenQwenError(
            f"These weights are {model.kind} already; their exact values are lost.",
            do="give the model that they were made from",
        )
    return model


def refresh(quantized: QuantizedQwen2, source: Qwen2) -> None:
    """Quantise the source's current weights into `quantized`, in place.

    The source has the same shape; a trainer may have changed its weights.
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
            gates = torch.cat([module.gate.weight, module.shared_expert_gate.weight])
            modules[name].register_buffer("gates", gates.detach().float())


def _matrices(
    quantized: QuantizedQwen2, source: Qwen2
) -> Iterator[tuple[PackedMatrix, Sequence[nn.Linear | Tensor]]]:
    """Yield each packed matrix with the parts of the source that it is merged from."""
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
            fused = plain.mlp.experts
            for expert, gate_up, down in zip(
                layer.mlp.experts, fused.gate_up_proj, fused.down_proj
            ):
                yield expert.gate_up_proj, [gate_up]
                yield expert.down_proj, [down]
        for packed_mlp, mlp in networks:
            yield packed_mlp.gate_up_proj, [mlp.gate_proj, mlp.up_proj]
            yield packed_mlp.down_proj, [mlp.down_proj]


def bits_per_weight(quantized: QuantizedQwen2) -> float:
    """Bits per weight of what one decoded token reads, scales included.

    The embedding table counts only where it is the output matrix too.
    """
    matrices = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    if quantized.lm_head is None:
        matrices.append(cast(Any, quantized._head))
    return 8 * sum(m.packed.nbytes for m in matrices) / sum(m.inputs * m.outputs for m in matrices)
