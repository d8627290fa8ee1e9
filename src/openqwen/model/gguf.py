"""Qwen2 in GGUF: llama.cpp's names of hyper-parameters and tensors, to and from the published ones.

Qwen2's RoPE pairs dimension i with i + d/2 in both, so no row of a matrix moves. A tied head is the file's lack of
`output.weight`. The experts of a layer are one tensor; the router of the shared expert has no first dimension.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Qwen2
from openqwen.model.gguf_blocks import dequantize, quantize
from openqwen.model.stored import Stored
from openqwen.model.weights import ignore, published_tensors
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import BLOCKS, GgufHeader, NewTensor, read_header, write_gguf

_ARCHITECTURES = {"qwen2": False, "qwen2moe": True}  # with experts or without
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_SPLIT = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)")


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration and where each tensor lies, by published name. Of a model in several files give the first."""
    header = read_header(path)
    stored: dict[str, Stored] = {}
    for file in (header, *_other_files(header)):
        for name, place in file.tensors.items():
            if place.type not in BLOCKS:
                raise OpenQwenError(
                    f"'{name}' is stored as {place.type}, which is not read here.",
                    where=file.path,
                    do=f"use a file of {', '.join(BLOCKS)}",
                )
            stored |= _published(name, Stored(file.path, place.shape, place.type, place.offset, place.size))
    return _config(header, stored), stored


def _other_files(header: GgufHeader) -> Iterator[GgufHeader]:
    count = header.metadata.get("split.count", 1)
    match = _SPLIT.fullmatch(header.path.name)
    if count > 1 and (match is None or int(match[2]) != 1):
        raise OpenQwenError(f"This is one of {count} files.", where=header.path, do="give the first, …-00001-of-….gguf")
    for number in range(2, count + 1):
        assert match is not None
        yield read_header(header.path.with_name(f"{match[1]}{number:05d}{match[3]}"))


def _published(name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor under its published name; the experts of a layer one by one; an unknown name stays as it is."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return {_OUTSIDE.get(name, name): stored}
    layer, own, kind = match.groups()
    stem = f"model.layers.{layer}"
    if own in _EXPERTS:
        experts = range(stored.shape[0])
        return {f"{stem}.mlp.experts.{e}.{_EXPERTS[own]}.{kind}": stored.part(e) for e in experts}
    if own == "ffn_gate_inp_shexp":
        stored = Stored(stored.path, (1, *stored.shape[-1:]), stored.type, stored.offset, stored.size)
    return {f"{stem}.{_IN_LAYER[own]}.{kind}" if own in _IN_LAYER else name: stored}


def _config(header: GgufHeader, stored: Mapping[str, Stored]) -> ModelConfig:
    """The hyper-parameters, by their names in `config.json`. What files leave out can be seen in the tensors."""
    metadata, where = header.metadata, str(header.path)
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise OpenQwenError(
            f"This file holds a network of the kind '{kind}'.", where=where, do="give one of Qwen2 or Qwen2.5"
        )

    def own(key: str, otherwise: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", otherwise)
        return _shortest(value) if isinstance(value, float) else value

    embedding = stored.get("model.embed_tokens.weight")
    values = {
        "model_type": "qwen2_moe" if _ARCHITECTURES[kind] else "qwen2",
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": own("attention.head_count_kv", own("attention.head_count")),
        "max_position_embeddings": own("context_length"),
        "rope_theta": own("rope.freq_base", 10_000.0),  # llama.cpp's, where the file is silent
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if _ARCHITECTURES[kind]:
        shared = stored.get("model.layers.0.mlp.shared_expert.up_proj.weight")
        expert = stored.get("model.layers.0.mlp.experts.0.up_proj.weight")
        values |= {
            "num_experts": own("expert_count"),
            "num_experts_per_tok": own("expert_used_count"),
            "moe_intermediate_size": own("expert_feed_forward_length", expert and expert.shape[0]),
            "shared_expert_intermediate_size": own("expert_shared_feed_forward_length", shared and shared.shape[0]),
        }
    if own("rope.scaling.type", "none") != "none":
        values["rope_scaling"] = {
            "rope_type": own("rope.scaling.type"),
            "factor": own("rope.scaling.factor"),
            "original_max_position_embeddings": own("rope.scaling.original_context_length"),
            "beta_fast": own("rope.scaling.yarn_beta_fast"),
            "beta_slow": own("rope.scaling.yarn_beta_slow"),
        }
    return ModelConfig.from_json(values, where)


def _shortest(value: float) -> float:
    """The number that was meant: 1e-06, where float32 holds 9.999999974752427e-07."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Rounded:
    """A tensor that a file holds less exactly than the network. error: ‖written − real‖ / ‖real‖."""

    name: str
    type: str
    error: float


KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # what a file is made of, and llama.cpp's number for it


def save_gguf(
    model: Qwen2,
    path: Path,
    kind: str,
    name: str,
    vocabulary: Mapping[str, Any],
    advance: Callable[[int], None] = ignore,
) -> list[Rounded]:
    """Write a .gguf file that llama.cpp loads; returns the tensors that lost precision.

    kind: one of `KINDS`, for the matrices. As in llama.cpp's own files, vectors and routers are F32, and a Q4_0 file
    has its output matrix (the embedding, where they are tied) in Q8_0. Rows that no block divides are F16.
    vocabulary: the `tokenizer.*` entries. advance: called with the number of weights written since the last call.
    """
    config = model.config
    metadata = {
        "general.architecture": "qwen2moe" if config.num_experts else "qwen2",
        "general.type": "model",
        "general.name": name,
        "general.file_type": KINDS[kind],
        "general.quantization_version": 2,
        **_hyper_parameters(config),
        **vocabulary,
    }
    rounded: list[Rounded] = []
    tensors = []
    for own, parts in _grouped(model).items():
        shape = (len(parts), *parts[0].shape) if own.split(".")[-2] in _EXPERTS else tuple(parts[0].shape)
        if own.endswith("ffn_gate_inp_shexp.weight"):
            shape = shape[1:]
        written = _type(own, shape, kind, config.tie_word_embeddings)
        tensors.append(NewTensor(own, shape, written, _packer(own, parts, written, rounded, advance)))
    write_gguf(path, metadata, tensors)
    return rounded


def not_stored(config: ModelConfig) -> list[str]:
    """What a checkpoint says that a GGUF file has no place for, a sentence each."""
    lost = []
    if config.dual_chunk:
        lost.append("dual chunk attention is not stored in GGUF: long sequences are read by plain RoPE")
    if config.yarn and config.yarn.attention_factor is not None:
        lost.append("YARN's own attention_factor is not stored in GGUF: llama.cpp takes 0.1 ln(factor) + 1")
    sampling = sorted(
        config.generation.keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    )
    if sampling:
        lost.append(f"generation defaults are not stored in GGUF: {', '.join(sampling)}")
    return lost


def _hyper_parameters(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_theta),
    }
    if yarn := config.yarn:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(yarn.factor),
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }
    if config.num_experts:
        if config.norm_topk_prob or not all(map(config.is_sparse, range(config.num_hidden_layers))):
            raise OpenQwenError(
                "llama.cpp's Qwen2-MoE has experts in every layer and does not renormalise their weights; this network"
                " differs (norm_topk_prob, decoder_sparse_step or mlp_only_layers).",
                do="keep it as a Hugging Face folder",
            )
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        }
    kind = "qwen2moe" if config.num_experts else "qwen2"
    return {f"{kind}.{key}": value for key, value in values.items()}


def _grouped(model: Qwen2) -> dict[str, list[Tensor]]:
    """The network's tensors by their names in GGUF; the experts of a layer are a list."""
    outside = {published: own for own, published in _OUTSIDE.items()}
    in_layer = {published: own for own, published in _IN_LAYER.items()}
    experts = {published: own for own, published in _EXPERTS.items()}
    layer = re.compile(r"model\.layers\.(\d+)\.(?:mlp\.experts\.\d+\.(\w+)|(.+))\.(weight|bias)")
    groups: dict[str, list[Tensor]] = {}
    for published, tensor in published_tensors(model):
        name = outside.get(published)
        if name is None:
            match = layer.fullmatch(published)
            assert match is not None, published
            own = experts[match[2]] if match[2] else in_layer[match[3]]
            name = f"blk.{match[1]}.{own}.{match[4]}"
        groups.setdefault(name, []).append(tensor.detach())
    return groups


def _type(name: str, shape: tuple[int, ...], kind: str, tied: bool) -> str:
    if len(shape) == 1 or ".ffn_gate_inp" in name:
        return "F32"
    if kind == "Q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        kind = "Q8_0"
    return "F16" if shape[-1] % BLOCKS[kind][0] else kind


def _packer(
    name: str, parts: list[Tensor], kind: str, rounded: list[Rounded], advance: Callable[[int], None]
) -> Callable[[], Iterator[memoryview]]:
    """The tensor's bytes, piece by piece; at the end an entry of `rounded` if any weight changed."""

    def pack() -> Iterator[memoryview]:
        wrong = total = 0.0
        for piece in (piece for part in parts for piece in part.reshape(-1).split(2**17)):
            real = piece.float().cpu().numpy()
            packed = quantize(real, kind)
            written = dequantize(packed, kind)
            if not np.isfinite(written).all():
                raise OpenQwenError(
                    f"'{name}' has weights that {kind} cannot hold (infinite, or no numbers).",
                    do="choose F32 or BF16, or find out where the training diverged",
                )
            wrong += float(np.square(written - real, dtype=np.float64).sum())
            total += float(np.square(real, dtype=np.float64).sum())
            yield packed.data
            advance(piece.numel())
        if wrong:
            rounded.append(Rounded(name, kind, math.sqrt(wrong / total)))

    return pack
