"""The Qwen2 network, top-down: model, layer, attention, norm.

Parameters have the names of the published checkpoints. Packed tokens are the only layout:
`model(tokens[T], positions[T], attention) -> hidden[T, D]`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.attention import Attention
from openqwen.model.config import ModelConfig
from openqwen.model.experts import Routing, SparseFeedForward
from openqwen.model.feed_forward import FeedForward
from openqwen.model.fused import fused
from openqwen.model.linear import Linear
from openqwen.model.rope import Rotation


class Decoder(nn.Module):
    """Embedding, pre-norm layers, final norm: the network without its head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        routing: Routing | None = None,
    ) -> Tensor:
        """Token ids [T] and positions in their documents [T] → hidden states [T, D].

        routing: sparse layers append their router's decisions to it.
        """
        x_TD = self.embed_tokens(tokens_T)
        rotation = attention.rotation(positions_T, self.config)
        return self.norm(self.through_layers(x_TD, rotation, attention, routing))

    def through_layers(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """[T, D] → [T, D], through all layers."""
        for layer in self.layers:
            x_TD = layer(x_TD, rotation, attention, routing)
        return x_TD


class Qwen2(nn.Module):
    """The language model: a decoder and a head, which may be the embedding (tie_word_embeddings).

    stored: the places of its weights in files, if it was loaded on the device "meta".
    """

    stored: Mapping[str, Any] | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else head

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: Attention,
        routing: Routing | None = None,
    ) -> Tensor:
        """See `Decoder.forward`."""
        return self.model(tokens_T, positions_T, attention, routing)

    @property
    def head_VD(self) -> Tensor:
        """The output matrix, [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Hidden states [T, D] → scores of the vocabulary, [T, V]."""
        if self.lm_head is None:
            return F.linear(hidden_TD, self.head_VD)
        return self.lm_head(hidden_TD)  # not by head_VD, which an adapter computes at each access

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, keys and values."""
        return self.model.embed_tokens.weight.dtype


class Scorer(nn.Module):
    """The reward model: a decoder with a linear output for each criterion, at the last token.

    The reward is the sum of a sequence's scores by criterion times the criteria's weights. It is
    saved as transformers' `Qwen2ForSequenceClassification` with a label for each criterion.

    criteria: name -> weight, in the order of the outputs; by default one, "reward".
    """

    def __init__(self, config: ModelConfig, criteria: Mapping[str, float] | None = None):
        super().__init__()
        self.config, self.criteria = config, dict(criteria or {"reward": 1.0})
        self.model = Decoder(config)
        self.score = nn.Linear(config.hidden_size, len(self.criteria), bias=False)

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attention: Attention, last_B: Tensor
    ) -> Tensor:
        """Scores [B, C] of B documents by C criteria; `last_B` are the rows of their last tokens.

        The hidden state of a last token is read once for all criteria.
        """
        return self.score(self.model(tokens_T, positions_T, attention)[last_B])

    def reward(self, scores_BC: Tensor) -> Tensor:
        """Rewards [B]: the weighted sums of scores by criterion."""
        return (scores_BC * self.weights_C.to(scores_BC.device)).sum(-1)

    @property
    def weights_C(self) -> Tensor:
        """The weights of the criteria, [C]."""
        return torch.tensor(list(self.criteria.values()))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embed_tokens.weight.device


class Layer(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = SelfAttention(config, number)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = (
            SparseFeedForward(config)
            if config.is_sparse(number)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, routing: Routing | None
    ) -> Tensor:
        """[T, D] → [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, attention)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD), routing)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; bias on q, k and v only."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.number = number
        self.heads = (-1, config.head_dim)  # −1: under tensor parallelism a rank has some of them
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """[T, D] → [T, D]."""
        q_THd = self.q_proj(x_TD).unflatten(-1, self.heads)
        k_TKd = self.k_proj(x_TD).unflatten(-1, self.heads)
        v_TKd = self.v_proj(x_TD).unflatten(-1, self.heads)
        return self.o_proj(attention.attend(q_THd, k_TKd, v_TKd, rotation, self.number).flatten(1))


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 and cast back, times a learned weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] → [T, D]."""
        if x_TD.dtype == torch.float32:
            return F.rms_norm(x_TD, self.weight.shape, self.weight.to(x_TD.dtype), self.eps)
        return _half_norm(x_TD, self.weight, self.eps)


@fused
def _half_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    normed_TD = F.rms_norm(x_TD.float(), weight_D.shape, None, eps)
    return weight_D * normed_TD.to(x_TD.dtype)


def initialize(model: Qwen2 | Scorer, generator: torch.Generator) -> None:
    """Draw matrices from N(0, initializer_range), set biases to 0 and norms to 1, as in Qwen2."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, model.config.initializer_range, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
