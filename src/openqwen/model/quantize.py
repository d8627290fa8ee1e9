"""A language model with weights of 8 or 4 bits: half or a quarter of bfloat16's bytes, multiplied as integers on a CPU.

Weights are signed numbers with a scale for each group of inputs (model/packed.py); activations become signed bytes on
the way into each matrix. Every output row is a function of its input row and the weights alone, to the bit: what else
is in the batch, and how many threads there are, never shows. Matrices that read the same input are one (q, k and v;
gate and up). The network is frozen, but gradients flow through it to its input, so adapters can learn on top of it.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_int64, c_void_p
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model import kernels
from openqwen.model.attention import Attention, Packed
from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Decoder, Qwen2, RMSNorm
from openqwen.model.experts import Routing, SparseFeedForward
from openqwen.model.packed import FORMATS, choose, in_bytes, pack, rows_of, unpack
from openqwen.model.rope import Rotation
from openqwen.model.weights import without_memory
from openqwen.support.errors import OpenQwenError

Kind = Literal["int8", "int4"]
Before = Callable[[Tensor], Tensor] | None  # an RMSNorm, `swiglu`, or nothing

_TABLE: Kind = "int8"  # of the embedding, whatever the rest is
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROWS = 256  # that pass through a feed-forward network at once: what lies between its matrices stays in the cache


def swiglu(x_TJ: Tensor) -> Tensor:
    """silu(gate) · up of [T, gate and up]: [T, width]."""
    gate, up = x_TJ.chunk(2, dim=-1)
    return F.silu(gate) * up


class PackedMatrix(nn.Module):
    """[outputs, inputs] in packed form, with a bias perhaps. parts: names and outputs of what it was merged from."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, parts: Mapping[str, int], kind: Kind, bias: bool = False):
        super().__init__()
        self.inputs, self.outputs, self.parts, self.form = inputs, sum(parts.values()), dict(parts), FORMATS[kind]
        self.register_buffer("packed", torch.empty(self.form.shape(self.outputs, inputs), dtype=torch.uint8))
        self.register_buffer("bias", torch.empty(self.outputs) if bias else None)
        self._call, self._called = torch.empty(0), (0, 0, 0)

    @property
    def weight(self) -> Tensor:
        """The matrix in float32 [outputs, inputs], made anew."""
        return unpack(self.packed, self.form, self.outputs, self.inputs)

    @torch.no_grad()
    def fill(self, weights: list[Tensor], biases: list[Tensor], matters: Tensor | None = None) -> None:
        """Take the values of these matrices, one after the other. matters: see `packed.choose`."""
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        if weight.dtype not in _TYPES:
            weight = weight.float()
        if self.packed.is_meta:
            self.packed = torch.empty(self.packed.shape, dtype=torch.uint8)
        if self.bias is not None:
            self.bias = torch.cat(biases).float()
        matters = None if matters is None else matters.float().contiguous()
        if kernel := kernels.function("openqwen_quantize", c_void_p, *[c_int64] * 4, c_void_p, c_void_p):
            kernels.follow_torch()
            sizes = (_TYPES[weight.dtype], *weight.shape, self.form.bits)
            kernel(weight.data_ptr(), *sizes, kernels.address(matters), self.packed.data_ptr())
        else:
            self.packed.copy_(pack(*choose(weight, self.form, matters), self.form))

    def times(self, x_TK: Tensor, before: Before = None, residual_TN: Tensor | None = None) -> Tensor:
        """residual + W before(x) + bias: [T, outputs]. Differentiable by x and the residual."""
        if not (torch.is_grad_enabled() and x_TK.requires_grad):
            return self._times(x_TK, before, residual_TN)
        y_TN = _Times.apply(x_TK if before is None else before(x_TK), self)
        return y_TN if residual_TN is None else residual_TN + y_TN

    def _times(self, x_TK: Tensor, before: Before, residual_TN: Tensor | None) -> Tensor:
        kernel = kernels.function("openqwen_linear", c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
        if kernel is None:
            x_TK = in_bytes(x_TK.float() if before is None else before(x_TK.float()), self.form)
            y_TN = F.linear(x_TK, self.weight, self.bias)
            return y_TN if residual_TN is None else residual_TN + y_TN
        kernels.follow_torch()
        x_TK = x_TK.float().contiguous()
        residual_TN = None if residual_TN is None else residual_TN.contiguous()
        out_TN = torch.empty(len(x_TK), self.outputs)
        kernel(self._address(before), x_TK.data_ptr(), len(x_TK), kernels.address(residual_TN), out_TN.data_ptr())
        return out_TN

    def _address(self, before: Before) -> int:
        """Of `struct Linear` in native/linear.cpp; made anew when memory moved."""
        norm = before if isinstance(before, RMSNorm) else None
        weight = 0 if norm is None else norm.weight.data_ptr()
        kind = 1 if norm is not None else 2 if before is swiglu else 0
        called = (self.packed.data_ptr(), weight, kind)
        if called != self._called:
            bias, eps = kernels.address(self.bias) or 0, 0.0 if norm is None else norm.eps
            values = (called[0], bias, weight, self.inputs, self.outputs, self.form.bits, kind, eps)
            self._call = torch.frombuffer(bytearray(struct.pack("=7qd", *values)), dtype=torch.int64).clone()
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

    def forward(self, x_TK: Tensor, before: Before = None, residual_TN: Tensor | None = None) -> Tensor:
        """[T, inputs] → [T, outputs]."""
        return self.times(x_TK, before, residual_TN)


class QuantizedEmbedding(PackedMatrix):
    """A table of packed rows, which may be the output matrix as well."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Token ids [T] → their rows [T, D], float32."""
        return rows_of(self.packed, self.form, tokens_T, self.inputs)


class QuantizedFeedForward(nn.Module):
    """SwiGLU of two packed matrices."""

    def __init__(self, hidden_size: int, width: int, kind: Kind):
        super().__init__()
        self.gate_up_proj = QuantizedLinear(hidden_size, {"gate_proj": width, "up_proj": width}, kind)
        self.down_proj = QuantizedLinear(width, {"down_proj": hidden_size}, kind)

    def forward(self, x_TD: Tensor, before: Before = None, residual_TD: Tensor | None = None) -> Tensor:
        """residual + down(swiglu(gate_up(before(x)))): [T, D]."""
        residuals = [None] * -(-len(x_TD) // _ROWS) if residual_TD is None else residual_TD.split(_ROWS)
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
        self.register_buffer("gates", torch.empty(config.num_experts + 1, config.hidden_size))  # the shared one's last

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """[T, D] → [T, D]; what the router decided goes into `routing`."""
        gates = self.get_buffer("gates")
        logits_TE = torch.stack([gates.mv(x_D) for x_D in x_TD])  # row by row: in a batch they would round otherwise
        p_TE = logits_TE[:, :-1].softmax(-1)
        weights_Tk, chosen_Tk = p_TE.topk(self.active, dim=-1)
        if self.renormalised:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        if routing is not None:
            routing.probabilities.append(p_TE)
            routing.chosen.append(chosen_Tk)
        y_TkD = x_TD.new_zeros(*chosen_Tk.shape, x_TD.shape[1])
        for number in chosen_Tk.unique().tolist():
            token, place = (chosen_Tk == number).nonzero(as_tuple=True)
            y_TkD[token, place] = self.experts[number](x_TD[token])
        shared_TD = logits_TE[:, -1:].sigmoid() * self.shared_expert(x_TD)
        return (y_TkD * weights_Tk.unsqueeze(2)).sum(1) + shared_TD


class QuantizedLayer(nn.Module):
    """As `decoder.Layer`, with norms, activations and residuals passed to the matrices that they stand beside."""

    def __init__(self, config: ModelConfig, number: int, kind: Kind):
        super().__init__()
        width, self.number, head = config.hidden_size, number, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        parts = {"q_proj": self.heads * head, "k_proj": self.kv_heads * head, "v_proj": self.kv_heads * head}
        self.input_layernorm = RMSNorm(config)
        self.qkv_proj = QuantizedLinear(width, parts, kind, bias=True)
        self.o_proj = QuantizedLinear(width, {"o_proj": width}, kind)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = (
            QuantizedSparseFeedForward(config, kind)
            if config.is_sparse(number)
            else QuantizedFeedForward(width, config.intermediate_size, kind)
        )

    def forward(self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None) -> Tensor:
        """[T, D] → [T, D]."""
        heads_THd = self.qkv_proj(x_TD, self.input_layernorm).unflatten(1, (self.heads + 2 * self.kv_heads, -1))
        q_THd, k_TKd, v_TKd = heads_THd.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        x_TD = self.o_proj(attention.attend(q_THd, k_TKd, v_TKd, rotation, self.number).flatten(1), None, x_TD)
        if isinstance(self.mlp, QuantizedSparseFeedForward):
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD), routing)
        return self.mlp(x_TD, self.post_attention_layernorm, x_TD)


class QuantizedQwen2(Qwen2):
    """The language model in packed weights: float32 in between, on a CPU, frozen."""

    def __init__(self, config: ModelConfig, kind: Kind):
        nn.Module.__init__(self)
        self.config, self.kind = config, kind
        with without_memory():
            self.model = Decoder(config)
            vocabulary = {"embed_tokens": config.vocab_size}
            self.model.embed_tokens = QuantizedEmbedding(config.hidden_size, vocabulary, _TABLE)
            self.model.layers = nn.ModuleList(QuantizedLayer(config, n, kind) for n in range(config.num_hidden_layers))
            shared = config.tie_word_embeddings and kind == _TABLE
            head = QuantizedLinear(config.hidden_size, {"lm_head": config.vocab_size}, kind)
        self.lm_head = None if shared else head
        self.requires_grad_(False)

    @property
    def _head(self) -> PackedMatrix:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def head_VD(self) -> Tensor:
        """The output matrix in float32, made anew: for training on top of it; `logits` reads the packed one."""
        return self._head.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """See `Qwen2.logits`."""
        return self._head.times(hidden_TD)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self._head.packed.device


def quantize(model: Qwen2, kind: Kind, matters: Mapping[str, Tensor] | None = None) -> QuantizedQwen2:
    """The same network with weights of 8 or 4 bits, in memory of its own. The source keeps its weights and may be dropped.

    matters: for published names of matrices (`model.layers.0.self_attn.q_proj`) how much each of their inputs counts,
    from `second_moments`; without, inputs behind a norm count by its weight squared, others all the same.
    Raises OpenQwenError where the model is not on a CPU, or the kind is unknown.
    """
    if kind not in FORMATS:
        raise OpenQwenError(f"Weights cannot be quantised to '{kind}'.", do=f"choose one of {', '.join(FORMATS)}")
    if model.device.type != "cpu":
        raise OpenQwenError(
            f"Quantised weights run on the CPU; this model is on {model.device}.",
            do='load it with device="cpu", or keep bfloat16 there',
        )
    quantized = QuantizedQwen2(model.config, kind)
    refresh(quantized, model, matters)
    return quantized


def refresh(quantized: QuantizedQwen2, source: Qwen2, matters: Mapping[str, Tensor] | None = None) -> None:
    """Quantise anew, in place, the weights of a source of the same shape, which a trainer has moved meanwhile."""
    known = matters or {}
    for name, matrix, linears, norm in _matrices(quantized, source):
        gamma = None if norm is None else norm.weight.detach().float().square()
        weights = [linear if isinstance(linear, Tensor) else linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if isinstance(linear, nn.Linear) and linear.bias is not None]
        matrix.fill([w.detach() for w in weights], [b.detach() for b in biases], known.get(name, gamma))
    modules = dict(quantized.named_modules())
    for name, module in source.named_modules():
        if isinstance(module, RMSNorm):
            modules[name].weight = nn.Parameter(module.weight.detach().float().clone(), requires_grad=False)
        if isinstance(module, SparseFeedForward):
            gates = torch.cat([module.gate.weight, module.shared_expert_gate.weight]).detach().float()
            modules[name].register_buffer("gates", gates)


def _matrices(
    quantized: QuantizedQwen2, source: Qwen2
) -> Iterator[tuple[str, PackedMatrix, list[nn.Linear] | list[Tensor], RMSNorm | None]]:
    """Every packed matrix: the published name of its first part, the matrix, its parts, the norm that it reads through."""
    yield "model.embed_tokens", quantized.model.embed_tokens, [source.model.embed_tokens.weight], None
    if quantized.lm_head is not None:
        yield "lm_head", quantized.lm_head, [source.head_VD], source.model.norm
    for number, (layer, plain) in enumerate(zip(quantized.model.layers, source.model.layers)):
        name, attention = f"model.layers.{number}", plain.self_attn
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        yield f"{name}.self_attn.q_proj", layer.qkv_proj, qkv, plain.input_layernorm
        yield f"{name}.self_attn.o_proj", layer.o_proj, [attention.o_proj], None
        norm, networks = plain.post_attention_layernorm, [("", layer.mlp, plain.mlp)]
        if isinstance(plain.mlp, SparseFeedForward):
            networks = [(".shared_expert", layer.mlp.shared_expert, plain.mlp.shared_expert)]
            for e, (gate_up, down) in enumerate(zip(plain.mlp.experts.gate_up_proj, plain.mlp.experts.down_proj)):
                yield f"{name}.mlp.experts.{e}.gate_proj", layer.mlp.experts[e].gate_up_proj, [gate_up], norm
                yield f"{name}.mlp.experts.{e}.down_proj", layer.mlp.experts[e].down_proj, [down], None
        for own, mine, theirs in networks:
            yield f"{name}.mlp{own}.gate_proj", mine.gate_up_proj, [theirs.gate_proj, theirs.up_proj], norm
            yield f"{name}.mlp{own}.down_proj", mine.down_proj, [theirs.down_proj], None


def bits_per_weight(quantized: QuantizedQwen2) -> float:
    """Of what one decoded token reads: every matrix and scale, without the embedding table unless it is the output."""
    matrices = [m for m in quantized.modules() if isinstance(m, QuantizedLinear) or m is quantized._head]
    return 8 * sum(m.packed.nbytes for m in matrices) / sum(m.inputs * m.outputs for m in matrices)


@torch.no_grad()
def second_moments(model: Qwen2, documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean square of every input of every linear layer, by its published name, over documents of token ids.

    What `quantize` takes as `matters`: a weight whose input is large is worth more care. The experts of a sparse layer
    are left out.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = found.get(name, 0) + inputs[0].float().square().sum(0)

        return look

    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    watches = [m.register_forward_pre_hook(watch(name)) for name, m in linears]
    try:
        for ids_T in documents:
            hidden_TD = model(ids_T, torch.arange(len(ids_T)), Packed.from_lengths([len(ids_T)]))
            found["lm_head"] = found.get("lm_head", 0) + hidden_TD.float().square().sum(0)
    finally:
        for watched in watches:
            watched.remove()
    tokens = sum(map(len, documents))
    return {name: total / tokens for name, total in found.items()}
