"""Qwen2 in GGUF: llama.cpp's names of hyper-parameters and tensors, to and from the published ones.

Qwen2's RoPE pairs dimension i with i + d/2 in both, so no row of a matrix moves. A tied head is the
file's lack of `output.weight`. The experts of a layer are one tensor; the router of the shared
expert has no first dimension.
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
from openqwen.model.long_context import yarn_temperature
from openqwen.model.stored import Stored
from openqwen.model.weights import ignore, published_tensors
from openqwen.support.errors import OpenQwenError
from openqwen.support.gguf import (
    BLOCKS,
    GgufHeader,
    NewTensor,
    other_files,
    read_first_header,
    write_gguf,
)

_ARCHITECTURES = {"qwen2": False, "qwen2moe": True}  # with experts or without
# Hyper-parameters: our name of each (config.json's), and GGUF's behind that of the architecture.
_SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_EXPERT_SIZES = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
_YARN = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
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


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration and where each tensor lies, by published name.

    Of a model in several files give the first.
    """
    header = read_first_header(path)
    stored: dict[str, Stored] = {}
    for file in (header, *other_files(header)):
        for name, place in file.tensors.items():
            if place.type not in BLOCKS:
                raise OpenQwenError(
                    f"'{name}' is stored as {place.type}, which is not read here.",
                    where=file.path,
                    do=f"use a file of {', '.join(BLOCKS)}",
                )
            stored |= _published(
                name, Stored(file.path, place.shape, place.type, place.offset, place.size)
            )
    return _config(header, stored), stored


def _published(name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor under its published name; the experts of a layer one by one; an unknown name stays
    as it is.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return {_OUTSIDE.get(name, name): stored}
    layer, own, kind = match.groups()
    stem = f"model.layers.{layer}"
    if own in _EXPERTS:
        experts = range(stored.shape[0])
        return {f"{stem}.mlp.experts.{e}.{_EXPERTS[own]}.{kind}": stored.part(e) for e in experts}
    if own == "ffn_gate_inp_shexp":
        stored = Stored(
            stored.path, (1, *stored.shape[-1:]), stored.type, stored.offset, stored.size
        )
    return {f"{stem}.{_IN_LAYER[own]}.{kind}" if own in _IN_LAYER else name: stored}


def _config(header: GgufHeader, stored: Mapping[str, Stored]) -> ModelConfig:
    """The hyper-parameters, by their names in `config.json`.

    What files leave out can be seen in the tensors.
    """
    metadata, where = header.metadata, str(header.path)
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise OpenQwenError(
            f"This file holds a network of the kind '{kind}'.",
            where=where,
            do="give one of Qwen2 or Qwen2.5",
        )

    def own(names: Mapping[str, str]) -> dict[str, Any]:
        values = {name: metadata.get(f"{kind}.{key}") for name, key in names.items()}
        return {
            name: _shortest(v) if isinstance(v, float) else v
            for name, v in values.items()
            if v is not None
        }

    def rows(name: str) -> int | None:
        return stored[name].shape[0] if name in stored else None

    values = {
        "model_type": "qwen2_moe" if _ARCHITECTURES[kind] else "qwen2",
        "vocab_size": rows("model.embed_tokens.weight"),
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count"),
        "rope_theta": 10_000.0,  # llama.cpp's, where the file is silent
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
        **own(_SIZES),
    }
    if _ARCHITECTURES[kind]:
        widths = {
            "moe_intermediate_size": rows("model.layers.0.mlp.experts.0.up_proj.weight"),
            "shared_expert_intermediate_size": rows(
                "model.layers.0.mlp.shared_expert.up_proj.weight"
            ),
        }
        values |= widths | own(_EXPERT_SIZES)
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"rope_type": scaling, **own(_YARN)}
    return ModelConfig.from_json(values, where)


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer in llama.cpp: those stated, and Qwen2's two by their names."""
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    names = list(metadata.get("tokenizer.ggml.tokens", ()))
    named = [names.index(name) for name in ("<|im_end|>", "<|endoftext|>") if name in names]
    return list(dict.fromkeys([i for i in stated if i is not None] + named))


def _shortest(value: float) -> float:
    """The number that was meant: 1e-06, where float32 holds 9.999999974752427e-07."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Rounded:
    """A tensor that a file holds less exactly than the network. error: ‖written − real‖ /
    ‖real‖.
    """

    name: str
    type: str
    error: float


KINDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "BF16": 32,
}  # what a file is made of, and llama.cpp's number for it


def save_gguf(
    model: Qwen2,
    path: Path,
    kind: str,
    name: str,
    vocabulary: Mapping[str, Any],
    advance: Callable[[int], None] = ignore,
) -> list[Rounded]:
    """Write a .gguf file that llama.cpp loads; returns the tensors that lost precision.

    kind: one of `KINDS`, for the matrices. As in llama.cpp's own files, vectors and routers are
    F32, and a Q4_0 file has its output matrix (the embedding, where they are tied) in Q8_0. Rows
    that no block divides are F16.
    vocabulary: the `tokenizer.*` entries. advance: called with the number of weights written since
    the last call.
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
        shape = (
            (len(parts), *parts[0].shape)
            if own.split(".")[-2] in _EXPERTS
            else tuple(parts[0].shape)
        )
        if own.endswith("ffn_gate_inp_shexp.weight"):
            shape = shape[1:]
        written = _type(own, shape, kind, config.tie_word_embeddings)
        tensors.append(
            NewTensor(own, shape, written, _packer(own, parts, written, rounded, advance))
        )
    write_gguf(path, metadata, tensors)
    return rounded


def not_stored(config: ModelConfig) -> list[str]:
    """What a checkpoint says that a GGUF file has no place for, a sentence each."""
    lost = []
    if config.dual_chunk:
        lost.append(
            "dual chunk attention is not stored in GGUF: long sequences are read by plain RoPE"
        )
    if config.yarn and config.yarn.temperature != yarn_temperature(config.yarn.factor):
        lost.append(
            "YARN's own attention_factor is not stored in GGUF: llama.cpp takes 0.1 ln(factor) + 1"
        )
    if config.yarn and not config.yarn.truncate:
        lost.append("YARN's truncate is not stored in GGUF: llama.cpp takes whole dimensions")
    sampling = sorted(
        config.generation.keys()
        - {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    )
    if sampling:
        lost.append(f"generation defaults are not stored in GGUF: {', '.join(sampling)}")
    return lost


def _hyper_parameters(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {key: getattr(config, name) for name, key in _SIZES.items()}
    reals = ["rope.freq_base"]
    if config.yarn:
        values |= {"rope.scaling.type": "yarn"} | {
            key: getattr(config.yarn, name) for name, key in _YARN.items()
        }
        reals += [_YARN["factor"], _YARN["beta_fast"], _YARN["beta_slow"]]
    values |= {
        key: float(values[key]) for key in reals
    }  # a whole number may stand for one in a config.json
    if config.num_experts:
        if config.norm_topk_prob or not all(map(config.is_sparse, range(config.num_hidden_layers))):
            raise OpenQwenError(
                "llama.cpp's Qwen2-MoE has experts in every layer and does not renormalise their "
                "weights; this network"
                " differs (norm_topk_prob, decoder_sparse_step or mlp_only_layers).",
                do="keep it as a Hugging Face folder",
            )
        values |= {key: getattr(config, name) for name, key in _EXPERT_SIZES.items()}
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
    name: str,
    parts: list[Tensor],
    kind: str,
    rounded: list[Rounded],
    advance: Callable[[int], None],
) -> Callable[[], Iterator[memoryview]]:
    """The tensor's bytes, piece by piece; at the end an entry of `rounded` if any weight
    changed.
    """

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
