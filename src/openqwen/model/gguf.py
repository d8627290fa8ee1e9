"""Qwen2 in GGUF: maps llama.cpp's names of hyper-parameters and tensors to the published ones.

Both pair dimension i with i + d/2 in RoPE, so rows of matrices keep their order. A file with a tied
head has no `output.weight`. The experts of a layer are one tensor; the gate of the shared expert is
a vector.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
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

_ARCHITECTURES = {"qwen2": False, "qwen2moe": True}  # whether there are experts
# Hyper-parameters: the name in config.json -> the name in GGUF, without the architecture before it.
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
    """The configuration, and the place of each tensor by its published name.

    path: of a model in several files the first.
    """
    header = read_first_header(path)
    stored: dict[str, Stored] = {}
    for file in (header, *other_files(header)):
        for name, place in file.tensors.items():
            if place.type not in BLOCKS:
                what = f"'{name}' is stored as {place.type}, which cannot be read."
                do = f"use a file of {', '.join(BLOCKS)}"
                raise OpenQwenError(what, where=file.path, do=do)
            tensor = Stored(file.path, place.shape, place.type, place.offset, place.size)
            stored |= _published(name, tensor)
    return _config(header, stored), stored


def _published(name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor under its published name, a layer's experts one by one; unknown names stay."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return {_OUTSIDE.get(name, name): stored}
    layer, module, kind = match.groups()
    stem = f"model.layers.{layer}"
    if module in _EXPERTS:
        stem = f"{stem}.mlp.experts"
        names = [f"{stem}.{e}.{_EXPERTS[module]}.{kind}" for e in range(stored.shape[0])]
        return {name: stored.part(e) for e, name in enumerate(names)}
    if module == "ffn_gate_inp_shexp":
        stored = replace(stored, shape=(1, *stored.shape[-1:]))
    return {f"{stem}.{_IN_LAYER[module]}.{kind}" if module in _IN_LAYER else name: stored}


def _config(header: GgufHeader, stored: Mapping[str, Stored]) -> ModelConfig:
    """The configuration, from the metadata and, where those are incomplete, the tensors' shapes."""
    metadata, where = header.metadata, str(header.path)
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        what = f"This file has a network of the architecture '{kind}'."
        raise OpenQwenError(what, where=where, do="give one of Qwen2 or Qwen2.5")

    def stated(names: Mapping[str, str]) -> dict[str, Any]:
        values = {name: metadata.get(f"{kind}.{key}") for name, key in names.items()}
        for name, value in values.items():
            if isinstance(value, float):
                # 1e-06 is stored as the float32 number 9.999999974752427e-07.
                values[name] = float(str(np.float32(value)))
        return {name: value for name, value in values.items() if value is not None}

    def rows(name: str) -> int | None:
        return stored[name].shape[0] if name in stored else None

    values = {
        "model_type": "qwen2_moe" if _ARCHITECTURES[kind] else "qwen2",
        "vocab_size": rows("model.embed_tokens.weight"),
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count"),
        "rope_theta": 10_000.0,  # llama.cpp's default
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
        **stated(_SIZES),
    }
    if _ARCHITECTURES[kind]:
        mlp = "model.layers.0.mlp"
        widths = {
            "moe_intermediate_size": rows(f"{mlp}.experts.0.up_proj.weight"),
            "shared_expert_intermediate_size": rows(f"{mlp}.shared_expert.up_proj.weight"),
        }
        values |= widths | stated(_EXPERT_SIZES)
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        values["rope_scaling"] = {"rope_type": scaling, **stated(_YARN)}
    return ModelConfig.from_json(values, where)


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer in llama.cpp: the stated ones, and Qwen2's two by their names."""
    stated = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    names = list(metadata.get("tokenizer.ggml.tokens", ()))
    named = [names.index(name) for name in ("<|im_end|>", "<|endoftext|>") if name in names]
    return list(dict.fromkeys([i for i in stated if i is not None] + named))


@dataclass(frozen=True)
class Rounded:
    """A tensor that was rounded when it was written. error: ‖written − exact‖ / ‖exact‖."""

    name: str
    type: str
    error: float


# Kinds of files that can be written -> llama.cpp's number for them (general.file_type).
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


def save_gguf(
    model: Qwen2,
    path: Path,
    kind: str,
    name: str,
    vocabulary: Mapping[str, Any],
    advance: Callable[[int], None] = ignore,
) -> list[Rounded]:
    """Write a .gguf file that llama.cpp loads; returns the tensors that were rounded.

    As in llama.cpp's own files, vectors and routers are F32, and a Q4_0 file has its output matrix
    (the embedding, where they are tied) in Q8_0. Matrices whose rows are no multiple of a block are
    F16.

    Args:
        model: not quantised.
        path: of the file.
        kind: one of `KINDS`, for the matrices.
        name: of the model, for the metadata.
        vocabulary: the `tokenizer.*` entries of the metadata.
        advance: called with the number of weights written since the last call.
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
    for tensor, parts in _grouped(model).items():
        shape = tuple(parts[0].shape)
        if tensor.split(".")[-2] in _EXPERTS:
            shape = (len(parts), *shape)
        if tensor.endswith("ffn_gate_inp_shexp.weight"):
            shape = shape[1:]
        written = _type(tensor, shape, kind, config.tie_word_embeddings)
        pack = partial(_pack, tensor, parts, written, rounded, advance)
        tensors.append(NewTensor(tensor, shape, written, pack))
    write_gguf(path, metadata, tensors)
    return rounded


def not_stored(config: ModelConfig) -> list[str]:
    """Sentences on each part of the configuration that a GGUF file cannot store."""
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
    values |= {key: float(values[key]) for key in reals}  # config.json may have them as integers
    if config.num_experts:
        if config.norm_topk_prob or not all(map(config.is_sparse, range(config.num_hidden_layers))):
            llama = "llama.cpp's Qwen2-MoE has experts in every layer and does not renormalise"
            names = "norm_topk_prob, decoder_sparse_step or mlp_only_layers"
            what = f"{llama} their weights; this network differs ({names})."
            raise OpenQwenError(what, do="keep it as a Hugging Face folder")
        values |= {key: getattr(config, name) for name, key in _EXPERT_SIZES.items()}
    kind = "qwen2moe" if config.num_experts else "qwen2"
    return {f"{kind}.{key}": value for key, value in values.items()}


def _grouped(model: Qwen2) -> dict[str, list[Tensor]]:
    """The network's tensors by their names in GGUF: a list of one, or of a layer's experts."""
    outside = {published: name for name, published in _OUTSIDE.items()}
    in_layer = {published: name for name, published in _IN_LAYER.items()}
    experts = {published: name for name, published in _EXPERTS.items()}
    layer = re.compile(r"model\.layers\.(\d+)\.(?:mlp\.experts\.\d+\.(\w+)|(.+))\.(weight|bias)")
    groups: dict[str, list[Tensor]] = {}
    for published, tensor in published_tensors(model):
        name = outside.get(published)
        if name is None:
            match = layer.fullmatch(published)
            assert match is not None, published
            module = experts[match[2]] if match[2] else in_layer[match[3]]
            name = f"blk.{match[1]}.{module}.{match[4]}"
        groups.setdefault(name, []).append(tensor.detach())
    return groups


def _type(name: str, shape: tuple[int, ...], kind: str, tied: bool) -> str:
    """The type in which a tensor is written; see `save_gguf`."""
    if len(shape) == 1 or ".ffn_gate_inp" in name:
        return "F32"
    if kind == "Q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        kind = "Q8_0"
    return "F16" if shape[-1] % BLOCKS[kind][0] else kind


def _pack(
    name: str,
    parts: list[Tensor],
    kind: str,
    rounded: list[Rounded],
    advance: Callable[[int], None],
) -> Iterator[memoryview]:
    """Yield a tensor's bytes in pieces; at the end append to `rounded` if any weight changed."""
    error = total = 0.0
    for piece in (piece for part in parts for piece in part.reshape(-1).split(2**17)):
        exact = piece.float().cpu().numpy()
        packed = quantize(exact, kind)
        written = dequantize(packed, kind)
        if not np.isfinite(written).all():
            what = f"'{name}' has weights that {kind} cannot store: too large, infinite or NaN."
            do = "choose F32 or BF16, or find out where the training diverged"
            raise OpenQwenError(what, do=do)
        error += float(np.square(written - exact, dtype=np.float64).sum())
        total += float(np.square(exact, dtype=np.float64).sum())
        yield packed.data
        advance(piece.numel())
    if error:
        rounded.append(Rounded(name, kind, math.sqrt(error / total)))
