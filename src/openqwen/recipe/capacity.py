"""Estimate the memory and the speed of a training step by arithmetic.

Memory is counted as this code allocates it; tests/recipe/test_capacity.py compares it with real
training steps. Speed is the network's floating-point operations at an assumed share of the device's
peak, and the bytes sent over the assumed bandwidth of the links.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from openqwen.model import ModelConfig
from openqwen.train.log_probs import BLOCK_BYTES
from openqwen.train.parallel import ParallelConfig
from openqwen.train.recompute import Recompute

GIB = 2**30
USABLE = 0.92  # share of a device's memory; the driver and fragmentation take the rest
_NETWORK = 50e9  # bytes per second of one device between machines
_MACHINE = 8  # devices of one machine
MOST_DEVICES = 4_096
_WORD = 4  # bytes: weights, gradients, moments and activations are float32
# Operations of a step relative to one without recomputation.
_RECOMPUTED: dict[Recompute, float] = {"nothing": 1.0, "cheap": 1.05, "layers": 4 / 3}


@dataclass(frozen=True)
class Device:
    """An accelerator: its memory, its peak and its links.

    memory: GiB. flops: peak operations per second of dense float32 matrix products (TF32 on a GPU).
    share: the share of the peak that training reaches. link: bytes per second to a neighbour, one
    way.
    """

    memory: float
    flops: float
    share: float
    link: float

    def holds(self, memory: "Memory") -> bool:
        """Return whether a step with this memory fits."""
        return memory.total <= USABLE * self.memory * GIB


DEVICES = {
    "H100": Device(80, 494e12, 0.4, 450e9),
    "H200": Device(141, 494e12, 0.4, 450e9),
    "A100-80": Device(80, 156e12, 0.5, 300e9),
    "A100-40": Device(40, 156e12, 0.5, 300e9),
    "L40S": Device(48, 183e12, 0.4, 25e9),
    "4090": Device(24, 82.6e12, 0.5, 12e9),
}


@dataclass(frozen=True)
class Setting:
    """How a training step is computed.

    micro_tokens: tokens of the largest forward call, over all ranks that share it. longest: tokens
    of the longest record, which is never cut. trained: share of the weights that are trained (small
    for adapters). moments: bytes of optimizer state for each trained weight. frozen: bytes of a
    weight that is not trained. others: complete further networks in memory. generates: whether the
    stage samples answers; over several devices a complete copy of the network does it.
    """

    devices: int
    parallel: ParallelConfig
    recompute: Recompute
    micro_tokens: int
    longest: int
    trained: float = 1.0
    moments: float = 2 * _WORD
    frozen: float = _WORD
    others: int = 0
    generates: bool = False

    @property
    def tokens(self) -> float:
        """Tokens of a forward call on one rank."""
        return self.micro_tokens / self.parallel.context


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    scores: float
    buffers: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


def memory(config: ModelConfig, setting: Setting) -> Memory:
    """Return the memory that a step needs on each rank."""
    ranks, parallel = setting.devices, setting.parallel
    weights = config.parameters()
    learned = weights * setting.trained
    table = config.vocab_size * config.hidden_size
    layer = max(_layer(config, sparse, parallel) for sparse in _kinds(config))
    buffers = 0.0
    if ranks > 1:
        # FSDP2 gathers the vocabulary's tables with their gradient, the layer at work, the next
        # layer, and one gradient.
        tables = table * (1 if config.tie_word_embeddings else 2)
        buffers = tables * (1 + (setting.trained == 1)) + layer * (2 + setting.trained)
    kept = _kept(config, setting)
    all_kept = _kept(config, replace(setting, recompute="nothing"))
    rows = setting.tokens / parallel.tensor  # divided over the ranks that hold the same tokens
    scores = min(rows * config.vocab_size, BLOCK_BYTES / _WORD) + rows * config.hidden_size
    if setting.trained == 1:
        scores += table  # the head's gradient, before it is added to the table's
    # The peak is either the head's backward pass or that of a layer with what it recomputes.
    again = (all_kept - kept) / config.num_hidden_layers
    again += setting.tokens * _passing(config, parallel.tensor)
    ends = 3 * setting.tokens * config.hidden_size
    others = setting.others + (setting.generates and ranks > 1)
    held = (learned * _WORD + (weights - learned) * setting.frozen) / ranks
    return Memory(
        weights=held + others * weights * _WORD,
        gradients=learned / ranks * _WORD,
        optimizer=learned / ranks * setting.moments,
        activations=(kept + ends) * _WORD + max(0.0, again - scores) * _WORD,
        scores=scores * _WORD,
        buffers=buffers * _WORD,
    )


@cache
def _kinds(config: ModelConfig) -> dict[bool, int]:
    """Return the number of sparse (True) and of dense (False) layers."""
    return Counter(config.is_sparse(n) for n in range(config.num_hidden_layers))


def _kept(config: ModelConfig, setting: Setting) -> float:
    """Return how many numbers all layers keep for the backward pass."""
    D, t = config.hidden_size, setting.parallel.tensor
    kv = config.num_key_value_heads * config.head_dim
    total = 0.0
    for sparse, layers in _kinds(config).items():
        width = config.shared_expert_intermediate_size if sparse else config.intermediate_size
        routed = config.num_experts_per_tok * config.moe_intermediate_size / t if sparse else 0.0
        if setting.recompute == "layers":
            per_token = float(D)
        elif setting.recompute == "cheap":
            per_token = 3 * D + 2 * (D + kv + width) / t
        else:
            router = D + 2 * config.num_experts if sparse else 0
            per_token = 5 * D + (3 * D + 2 * kv + 4 * width) / t + 2 * routed + router
        total += layers * per_token
    return total * setting.tokens


def _passing(config: ModelConfig, tensor: int) -> float:
    """Return the numbers per token that a layer's backward pass allocates and frees again."""
    width = config.intermediate_size
    if config.num_experts:
        width = config.shared_expert_intermediate_size
    routed = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    return config.hidden_size + max(width, routed) / tensor


def _layer(config: ModelConfig, sparse: bool, parallel: ParallelConfig) -> float:
    """Return the weights of a layer that a rank gathers to compute it."""
    h, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    dense = 2 * h * h + 2 * h * kv
    if not sparse:
        return (dense + 3 * h * config.intermediate_size) / parallel.tensor
    dense += 3 * h * config.shared_expert_intermediate_size
    experts = 3 * h * config.num_experts * config.moe_intermediate_size
    return dense / parallel.tensor + experts / parallel.expert


def tokens_per_second(
    config: ModelConfig, setting: Setting, device: Device, context: float
) -> float:
    """Return the speed of all devices together; context: mean number of tokens before a token."""
    parallel, ranks, D = setting.parallel, setting.devices, config.hidden_size
    t, c, e, T = parallel.tensor, parallel.context, parallel.expert, setting.tokens
    operations = config.flops_per_token(context) * setting.micro_tokens
    operations *= _RECOMPUTED[setting.recompute]
    compute = operations / (c * t) / (device.flops * device.share)
    bandwidth = device.link if ranks <= _MACHINE else _NETWORK
    kinds = _kinds(config).items()
    layers = sum(count * _layer(config, sparse, parallel) for sparse, count in kinds)
    gathered = layers + 2 * config.vocab_size * D
    # FSDP2 sends the weights twice and the gradients once, while other layers compute.
    fsdp = 3 * _WORD * gathered * (1 - 1 / ranks) / bandwidth
    kv = config.num_key_value_heads * config.head_dim
    # Tensor parallel: an all-reduce after attention and after the feed-forward network, both ways.
    sent = 8 * 2 * T * D * (1 - 1 / t)
    # Context parallel: queries, keys, values and answers.
    sent += 2 * 2 * T * (D + kv) / t * (1 - 1 / c)
    if config.num_experts:
        sent += 4 * T * config.num_experts_per_tok * D / t * (1 - 1 / e)
    waited = config.num_hidden_layers * sent * _WORD / device.link
    return setting.micro_tokens * (ranks / (c * t)) / (max(compute, fsdp) + waited)


def smallest_change(config: ModelConfig, setting: Setting, device: Device) -> Setting | None:
    """Return the setting with the first usual change that makes a step fit, or None.

    In this order: smaller micro-batches, recomputation, twice as many devices and so on.
    """
    devices = setting.devices
    while devices <= MOST_DEVICES:
        more = replace(setting, devices=devices)
        small = replace(more, micro_tokens=setting.longest)
        changes = [
            more,
            small,
            replace(small, recompute="cheap"),
            replace(small, recompute="layers"),
        ]
        for changed in changes:
            if device.holds(memory(config, changed)):
                return changed
        devices *= 2
    return None
