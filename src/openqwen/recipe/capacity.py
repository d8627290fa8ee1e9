"""What a training step needs of each rank's memory and of time, by arithmetic: an estimate, before
anyone pays for it.

Memory is counted as this code allocates it (tests/recipe/test_capacity.py holds it to what it
really takes). Speed is the network's operations at an assumed share of the device's peak, and bytes
sent over the assumed speed of the links.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from openqwen.model import ModelConfig
from openqwen.train.log_probs import BLOCK_BYTES
from openqwen.train.parallel import ParallelConfig
from openqwen.train.parallel.degrees import faults
from openqwen.train.recompute import Recompute

GIB = 2**30
USABLE = 0.92  # of a device's memory: the rest is the driver's, and what lies between blocks
NETWORK = 50e9  # bytes a second of one device between machines
MACHINE = 8  # devices of one machine
_WORD = 4  # bytes: weights, gradients, moments and activations are float32
_AGAIN: dict[Recompute, float] = {
    "nothing": 1.0,
    "cheap": 1.05,
    "layers": 4 / 3,
}  # operations, of the plain step's


@dataclass(frozen=True)
class Device:
    """memory: GiB. flops: operations a second of float32 matrices (TF32 on a GPU), as its maker
    says, dense. share: of that, what training reaches. link: bytes a second to its neighbours, one
    way."""

    memory: float
    flops: float
    share: float
    link: float


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
    """How a step is done.

    micro_tokens: of the largest forward call, on all ranks that share it. longest: of the longest
    record, which is never cut. trained: weights that learn, of all (adapters: few). moments: bytes
    of what the optimizer keeps of each.
    frozen: bytes of a weight that does not learn. others: whole networks beside.
    """

    devices: int
    parallel: ParallelConfig
    recompute: Recompute
    micro_tokens: int
    longest: int
    trained: float = 1.0
    moments: float = 2 * _WORD
    frozen: float = _WORD
    others: float = 0.0

    @property
    def tokens(self) -> float:
        """Of a forward call, on one rank."""
        return self.micro_tokens / self.parallel.context


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    scores: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def memory(config: ModelConfig, setting: Setting) -> Memory:
    """What a step holds on each rank; see `Memory`."""
    ranks, parallel = setting.devices, setting.parallel
    weights = config.parameters()
    learned = weights * setting.trained
    table = config.vocab_size * config.hidden_size
    layer = max(_layer(config, sparse, parallel) for sparse in _kinds(config))
    buffers = 0.0
    if (
        ranks > 1
    ):  # FSDP2: the tables whole, with their gradient; the layer at work, the next, and a gradient
        tables = table * (1 if config.tie_word_embeddings else 2)
        buffers = tables * (1 + (setting.trained == 1)) + layer * (2 + setting.trained)
    kept, whole = _kept(config, setting), _kept(config, replace(setting, recompute="nothing"))
    rows = setting.tokens / parallel.tensor  # dealt to all ranks that hold the same
    scores = min(rows * config.vocab_size, BLOCK_BYTES / _WORD) + rows * config.hidden_size
    scores += (
        table if setting.trained == 1 else 0
    )  # the head's gradient, before it is added to the table's
    # Either the head's backward pass is the worst moment, or that of a layer, with what it computes
    # again.
    again = (whole - kept) / config.num_hidden_layers + setting.tokens * _passing(
        config, parallel.tensor
    )
    ends = 3 * setting.tokens * config.hidden_size
    return Memory(
        weights=(learned * _WORD + (weights - learned) * setting.frozen) / ranks
        + setting.others * weights * _WORD,
        gradients=learned / ranks * _WORD,
        optimizer=learned / ranks * setting.moments,
        activations=(kept + ends) * _WORD + max(0.0, again - scores) * _WORD,
        scores=scores * _WORD,
        buffers=buffers * _WORD,
    )


@cache
def _kinds(config: ModelConfig) -> dict[bool, int]:
    """How many layers are sparse, and how many are not."""
    return Counter(config.is_sparse(n) for n in range(config.num_hidden_layers))


def _kept(config: ModelConfig, setting: Setting) -> float:
    """Numbers that all layers keep for the backward pass."""
    D, t, kv = (
        config.hidden_size,
        setting.parallel.tensor,
        config.num_key_value_heads * config.head_dim,
    )
    total = 0.0
    for sparse, layers in _kinds(config).items():
        width = config.shared_expert_intermediate_size if sparse else config.intermediate_size
        routed = config.num_experts_per_tok * config.moe_intermediate_size / t if sparse else 0.0
        if setting.recompute == "layers":
            own = float(D)
        elif setting.recompute == "cheap":
            own = 3 * D + 2 * (D + kv + width) / t
        else:
            router = D + 2 * config.num_experts if sparse else 0
            own = 5 * D + (3 * D + 2 * kv + 4 * width) / t + 2 * routed + router
        total += layers * own
    return total * setting.tokens


def _passing(config: ModelConfig, tensor: int) -> float:
    """Numbers a token that one layer's backward pass holds beyond those kept, which it frees on the
    way.
    """
    width = (
        config.shared_expert_intermediate_size if config.num_experts else config.intermediate_size
    )
    routed = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    return config.hidden_size + max(width, routed) / tensor


def _layer(config: ModelConfig, sparse: bool, parallel: ParallelConfig) -> float:
    """Weights of a layer that a rank gathers to work on it."""
    h, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    cut = 2 * h * h + 2 * h * kv
    if not sparse:
        return (cut + 3 * h * config.intermediate_size) / parallel.tensor
    experts = 3 * h * config.num_experts * config.moe_intermediate_size
    return (
        cut + 3 * h * config.shared_expert_intermediate_size
    ) / parallel.tensor + experts / parallel.expert


def tokens_per_second(
    config: ModelConfig, setting: Setting, device: Device, context: float
) -> float:
    """Of all devices together; context: how many tokens a token sees, in the mean."""
    parallel, ranks, D = setting.parallel, setting.devices, config.hidden_size
    t, c, e, T = parallel.tensor, parallel.context, parallel.expert, setting.tokens
    operations = config.flops_per_token(context) * setting.micro_tokens * _AGAIN[setting.recompute]
    compute = operations / (c * t) / (device.flops * device.share)
    near = device.link if ranks <= MACHINE else NETWORK
    layers = sum(
        layers * _layer(config, sparse, parallel) for sparse, layers in _kinds(config).items()
    )
    gathered = layers + 2 * config.vocab_size * D
    fsdp = (
        3 * _WORD * gathered * (1 - 1 / ranks) / near
    )  # weights twice, gradients once; while others compute
    kv = config.num_key_value_heads * config.head_dim
    sent = (
        8 * 2 * T * D * (1 - 1 / t)
    )  # an all-reduce behind attention and one behind the feed-forward, each way
    sent += 2 * 2 * T * (D + kv) / t * (1 - 1 / c)  # queries, keys, values and answers
    sent += 4 * T * config.num_experts_per_tok * D / t * (1 - 1 / e) if config.num_experts else 0
    waited = config.num_hidden_layers * sent * _WORD / device.link
    return setting.micro_tokens * (ranks / (c * t)) / (max(compute, fsdp) + waited)


def choices(config: ModelConfig, setting: Setting) -> Iterator[Setting]:
    """This setting with every division, recomputation and smaller micro-batch that network and
    devices allow.
    """
    powers = [2**n for n in range(int(math.log2(max(1, setting.devices))) + 1)]
    experts = powers if config.num_experts else [1]
    for tensor, expert, context in product([p for p in powers if p <= MACHINE], experts, powers):
        parallel = ParallelConfig(tensor=tensor, expert=expert, context=context)
        if not faults(parallel, config, setting.devices) and (setting.trained == 1 or tensor == 1):
            for recompute, halvings in product(_AGAIN, range(8)):
                micro = max(setting.longest, setting.micro_tokens >> halvings)
                yield replace(setting, parallel=parallel, recompute=recompute, micro_tokens=micro)


def best(config: ModelConfig, setting: Setting, device: Device, context: float) -> Setting | None:
    """The fastest choice that fits a device's memory; of equals the one that divides least."""
    fitting = [
        s
        for s in choices(config, setting)
        if memory(config, s).total <= USABLE * device.memory * GIB
    ]
    speed = lambda s: (round(tokens_per_second(config, s, device, context), -1), -s.parallel.ranks)  # noqa: E731
    return max(fitting, key=speed, default=None)
