"""How many ranks share a network's matrices, its experts and its tokens; the rest share the
micro-batches.
"""

from pydantic import Field

from openqwen.model import ModelConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Settings

PLACE = "train.parallel"


class ParallelConfig(Settings):
    """How the processes of torchrun divide the work. Memory and speed alone: loss and gradient
    stay.

    All of them shard weights, gradients and optimizer states (FSDP2); that many times fewer get
    micro-batches of their own. The processes must be a multiple of tensor x expert x context.
    """

    tensor: int = Field(
        1, ge=1, description="ranks that share each layer's heads and widths; divides the KV heads"
    )
    expert: int = Field(
        1, ge=1, description="ranks that share the experts of a layer; divides the experts"
    )
    context: int = Field(
        1, ge=1, description="ranks that share the tokens of each row; divides the heads of a rank"
    )

    @property
    def ranks(self) -> int:
        """Ranks of one copy of the work: the processes are a multiple of it."""
        return self.tensor * self.expert * self.context


def faults(
    parallel: ParallelConfig, config: ModelConfig, size: int | None = None
) -> list[tuple[str, str, str]]:
    """What of these degrees does not fit a network, on `size` processes if given: (what, key, what
    to do) of each.
    """
    tensor, expert, context = parallel.tensor, parallel.expert, parallel.context
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sparse = [config.is_sparse(n) for n in range(config.num_hidden_layers)]
    widths = {config.shared_expert_intermediate_size} if any(sparse) else set()
    widths |= set() if all(sparse) else {config.intermediate_size}
    found = []
    if size is not None and size % parallel.ranks:
        processes = "1 process is" if size == 1 else f"{size} processes are"
        what = f"{processes} no multiple of tensor x expert x context = {parallel.ranks}."
        found.append(
            (
                what,
                "",
                (
                    f"start torchrun with a multiple of {parallel.ranks} processes, or lower the "
                    "degrees"
                ),
            )
        )
    if kv_heads % tensor:
        what = f"{kv_heads} key/value heads cannot be dealt to {tensor} ranks."
        found.append(
            (
                what,
                "tensor",
                f"choose a divisor of {kv_heads}; `context` divides the query heads further",
            )
        )
    if odd := [w for w in widths if w % tensor]:
        what = f"A feed-forward width of {odd[0]} cannot be dealt to {tensor} ranks."
        found.append((what, "tensor", "choose a divisor of it"))
    if heads % tensor == 0 and heads // tensor % context:
        what = f"The {heads // tensor} query heads of a rank cannot be dealt to {context} ranks."
        found.append((what, "context", f"choose a divisor of {heads // tensor}"))
    if expert > 1 and config.num_experts % expert:
        what = f"{config.num_experts} experts cannot be dealt to {expert} ranks."
        found.append((what, "expert", f"choose a divisor of {config.num_experts}"))
    if expert > 1 and not config.num_experts:
        found.append(("A dense network has no experts to deal out.", "expert", "set it to 1"))
    return found


def check(parallel: ParallelConfig, config: ModelConfig, size: int) -> None:
    """OpenQwenError where the degrees do not fit the network or the processes, naming which and
    what to do.
    """
    for what, key, do in faults(parallel, config, size):
        raise OpenQwenError(what, where=f"{PLACE}.{key}".rstrip("."), do=do)
