"""The numbers that define a Qwen2 network, as in `config.json`."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from openqwen.model import published
from openqwen.model.long_context import DualChunk, LongContext, Yarn
from openqwen.support.errors import OpenQwenError, located, suggestion

_MODEL_TYPES = ("qwen2", "qwen2_moe")
_ONE_MILLION_NAMES = {
    "qwen2.5-7b-1m": "qwen2.5-7b-instruct-1m",
    "qwen2.5-14b-1m": "qwen2.5-14b-instruct-1m",
}


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen2 / Qwen2.5 network, dense or mixture of experts; fields are named as in config.json.

    `vocab_size` counts embedding rows: the tokenizer's ids and padding rows, which are never
    targets. A model with num_experts > 0 is `qwen2_moe`; then intermediate_size is the width of its
    dense layers, if it has any.

    other, generation: all other fields of the checkpoint's config.json, and those of its
    generation_config.json. The network does not use them; saving writes them again.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32_768
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    other: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _SIZES:
            if (size := getattr(self, name)) < 1:
                raise OpenQwenError(f"{name} is {size}, not at least 1.", where=f"model.{name}")
        if not self.rope_theta > 1:
            what = f"rope_theta is {self.rope_theta}, not above 1."
            raise OpenQwenError(what, where="model.rope_theta", do="give Qwen2's 10000 or 1000000")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            what = f"hidden_size {self.hidden_size} does not give {heads} heads of an even size."
            do = "make hidden_size a multiple of 2 × num_attention_heads"
            raise OpenQwenError(what, where="model.hidden_size", do=do)
        if heads % kv_heads:
            what = f"{heads} query heads cannot share {kv_heads} key/value heads."
            do = "choose a divisor of num_attention_heads"
            raise OpenQwenError(what, where="model.num_key_value_heads", do=do)
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            chosen = f"{self.num_experts_per_tok} of {self.num_experts} experts"
            what = f"A token cannot pass through {chosen}."
            raise OpenQwenError(what, where="model.num_experts_per_tok")

    @property
    def head_dim(self) -> int:
        """Width of one head, d."""
        return self.hidden_size // self.num_attention_heads

    @property
    def long_context(self) -> LongContext:
        """How sequences are read by default: by the checkpoint's YARN and Dual Chunk Attention."""
        return LongContext(self.yarn, self.dual_chunk)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer: the stated ones that are in the vocabulary."""
        return tuple(i for i in self.stated_stops if 0 <= i < self.vocab_size)

    @property
    def stated_stops(self) -> tuple[int, ...]:
        """`eos_token_id` of config.json and generation_config.json together, in that order."""
        ids = token_ids(self.other.get("eos_token_id", self.eos_token_id))
        return tuple(dict.fromkeys([*ids, *token_ids(self.generation.get("eos_token_id"))]))

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts in place of one feed-forward network."""
        return (
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @classmethod
    def named(cls, name: str) -> "ModelConfig":
        """The configuration of a published model, such as `qwen2-7b` or `Qwen/Qwen2-57B-A14B`."""
        key = name.lower().removeprefix("qwen/")
        key = _ONE_MILLION_NAMES.get(key, key)
        if key not in published.NAMES:
            near = suggestion(key, published.NAMES)
            raise OpenQwenError(
                f"No published model is called '{name}'.{near}",
                do=f"known names: {', '.join(published.NAMES)}",
            )
        return cls.from_json(published.config_json(key), where=name)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a `config.json`.

        Raises OpenQwenError where it is not of a Qwen2 model, or needs what no released Qwen2 has.
        """
        _check_kind(values, where)
        rope = _rope(values, where)
        chunks = values.get("dual_chunk_attention_config")
        names = {f.name for f in fields(cls)} - _NOT_IN_FILE
        if values.get("model_type", "qwen2") != "qwen2_moe":
            names -= _EXPERT_FIELDS
        absent = {name for name in _REQUIRED if values.get(name) is None}
        chosen = {k: v for k, v in values.items() if k in names - absent}
        chosen["rope_theta"] = rope["rope_theta"]
        if "num_key_value_heads" in values and "num_attention_heads" in chosen:
            # Null means as many as there are query heads.
            chosen.setdefault("num_key_value_heads", chosen["num_attention_heads"])
        ends = token_ids(chosen.get("eos_token_id"), where)
        several = isinstance(chosen.get("eos_token_id"), list)  # then the list is kept in `other`
        chosen["eos_token_id"] = ends[0] if ends else None
        if "mlp_only_layers" in chosen:
            chosen["mlp_only_layers"] = tuple(chosen["mlp_only_layers"] or ())
        if missing := (_REQUIRED | (_EXPERTS_REQUIRED & names)) - chosen.keys():
            raise OpenQwenError(f"config.json lacks {', '.join(sorted(missing))}.", where=where)
        _check_types(chosen, where)
        used = names - {"eos_token_id"} if several else names
        other = {key: value for key, value in values.items() if key not in used}
        length = chosen.get("max_position_embeddings", cls.max_position_embeddings)
        with located(where):
            return cls(
                **chosen,
                yarn=Yarn.from_json(rope, length),
                dual_chunk=DualChunk.from_json(chunks) if chunks else None,
                other=other,
            )

    def to_json(self, head: str = "ForCausalLM", dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` for transformers, vLLM and llama.cpp's converter.

        Fields that were read and not used are written again. RoPE keeps its spelling:
        `rope_scaling`, or transformers 5's `rope_parameters`.

        Args:
            head: of the decoder, `ForCausalLM` or `ForSequenceClassification`.
            dtype: of the weights.
        """
        skipped = _NOT_IN_FILE if self.num_experts else _NOT_IN_FILE | _EXPERT_FIELDS
        network = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        network["eos_token_id"] = self.other.get("eos_token_id", self.eos_token_id)
        if self.num_experts:
            network["mlp_only_layers"] = list(self.mlp_only_layers)
        kind = {
            "architectures": [("Qwen2Moe" if self.num_experts else "Qwen2") + head],
            "model_type": "qwen2_moe" if self.num_experts else "qwen2",
        }
        values = kind | _USUAL | dict(self.other) | network | kind
        if self.dual_chunk:
            values["dual_chunk_attention_config"] = {
                **self.other.get("dual_chunk_attention_config", {}),
                **self.dual_chunk.to_json(),
            }
        else:
            values.pop("dual_chunk_attention_config", None)
        for key in {"dtype", "torch_dtype"} & self.other.keys() or {"torch_dtype"}:
            values[key] = dtype
        return values | self._rope_json(values)

    def _rope_json(self, values: dict[str, Any]) -> dict[str, Any]:
        """The entries for RoPE; the old ones are removed from `values`."""
        old = values.pop("rope_scaling", None) or {}
        if values.pop("rope_parameters", None) is not None:
            plain = {
                "rope_theta": values.pop("rope_theta"),
                "rope_type": "yarn" if self.yarn else "default",
            }
            return {"rope_parameters": plain | (self.yarn.to_json() if self.yarn else {})}
        key = "rope_type" if "rope_type" in old else "type"
        return {"rope_scaling": {key: "yarn", **self.yarn.to_json()}} if self.yarn else {}

    def with_rope(self, theta: float, positions: int) -> "ModelConfig":
        """The same network with another RoPE base and context length, to train long sequences."""
        return replace(self, rope_theta=theta, max_position_embeddings=positions)

    def parameters(self, active: bool = False) -> int:
        """Exact number of parameters; active: of those, one token's."""
        layers = sum(self._layer_matrices(n, active) for n in range(self.num_hidden_layers))
        biases = self.hidden_size + 2 * self.num_key_value_heads * self.head_dim
        vectors = self.num_hidden_layers * (biases + 2 * self.hidden_size) + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return layers + vectors + tables * self.vocab_size * self.hidden_size

    def flops_per_token(self, context: float) -> float:
        """Floating-point operations of one token, forward and backward.

        They are 6 for each parameter of the matrices that the token passes (the head counts, the
        embedding look-up does not), and attention's two products. context: mean number of tokens
        that a token attends to.
        """
        return self.flops(tokens=1, targets=1, seen=context)

    def flops(self, tokens: int, targets: int, seen: float) -> float:
        """The same for a batch with `targets` tokens at the head and `seen` pairs in attention."""
        layers = sum(self._layer_matrices(n, active=True) for n in range(self.num_hidden_layers))
        head = self.vocab_size * self.hidden_size
        attention = 12.0 * self.num_hidden_layers * self.hidden_size * seen
        return 6.0 * (tokens * layers + targets * head) + attention

    def _layer_matrices(self, layer: int, active: bool) -> int:
        """Matrix elements of one layer."""
        h, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        attention = 2 * h * h + 2 * h * kv
        if not self.is_sparse(layer):
            return attention + 3 * h * self.intermediate_size
        experts = self.num_experts_per_tok if active else self.num_experts
        widths = experts * self.moe_intermediate_size + self.shared_expert_intermediate_size
        router, shared_gate = h * self.num_experts, h
        return attention + 3 * h * widths + router + shared_gate


_REQUIRED = {
    f.name for f in fields(ModelConfig) if f.default is MISSING and f.default_factory is MISSING
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_EXPERTS_REQUIRED = {
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
}
_EXPERT_FIELDS = _EXPERTS_REQUIRED | {
    "norm_topk_prob",
    "router_aux_loss_coef",
    "decoder_sparse_step",
    "mlp_only_layers",
}
_NOT_IN_FILE = {"yarn", "dual_chunk", "other", "generation"}  # not in config.json by these names
_USUAL = {  # fields that other software expects, the same in every released Qwen2
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_cache": True,
    "use_sliding_window": False,
}


_KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
_THETA = 10_000.0  # the default of transformers and llama.cpp


def token_ids(value: Any, where: str | None = None) -> list[int]:
    """`eos_token_id` as a list; a file may have an id, a list or null, else OpenQwenError."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        do = "give an id, a list of ids, or null"
        raise OpenQwenError(f"eos_token_id is {value!r}.", where=where, do=do)
    return ids


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of config.json for RoPE, with `rope_theta`.

    As in transformers, `rope_scaling` takes precedence over transformers 5's `rope_parameters`.
    Qwen's model cards say to add `rope_scaling`, so theta is still taken from the other, which
    transformers would lose.
    """
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for rope in (new, old):
        plain = isinstance(rope, Mapping) and not any(isinstance(v, Mapping) for v in rope.values())
        if not plain:
            raise OpenQwenError(f"RoPE is {rope}, not one table for all layers.", where=where)
    rope = dict(old or new)
    thetas = (part.get("rope_theta") for part in (old, new, values))
    rope["rope_theta"] = next((theta for theta in thetas if theta is not None), _THETA)
    # As in transformers, the value at the top level takes precedence.
    if (length := values.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = length
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise OpenQwenError(f"partial_rotary_factor is {share}, not 1.", where=where)
    return rope


def _check_types(chosen: Mapping[str, Any], where: str) -> None:
    kinds = {f.name: _KINDS[f.type] for f in fields(ModelConfig) if f.type in _KINDS}
    for name, value in chosen.items():
        if type(value) not in kinds.get(name, (type(value),)):
            wanted = " or ".join(kind.__name__ for kind in kinds[name])
            raise OpenQwenError(f"{name} is {value!r}, not of the type {wanted}.", where=where)


def _check_kind(values: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, Mapping):
        raise OpenQwenError("This file is JSON but not an object.", where=where)
    for name in ("quantization_config", "dual_chunk_attention_config"):
        if not isinstance(values.get(name) or {}, Mapping):
            raise OpenQwenError(f"{name} is {values[name]!r}, not an object.", where=where)
    kind = values.get("model_type", "qwen2")
    if kind not in _MODEL_TYPES:
        raise OpenQwenError(
            f"model_type is '{kind}', not one of {', '.join(_MODEL_TYPES)}.", where=where
        )
    if values.get("use_sliding_window"):
        what = "use_sliding_window is true; no released Qwen2 uses a sliding window."
        raise OpenQwenError(what, where=where)
    layers = values.get("layer_types") or []
    layers = layers if isinstance(layers, list) else [layers]
    if odd := {str(kind) for kind in layers} - {"full_attention"}:
        raise OpenQwenError(f"layer_types holds {', '.join(sorted(odd))}.", where=where)
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise OpenQwenError(f"hidden_act is '{activation}'; Qwen2's is silu.", where=where)
