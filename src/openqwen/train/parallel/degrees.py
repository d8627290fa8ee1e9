"""How many ranks share a network's matrices, its experts and its tokens."""

from pydantic import Field

from openqwen.model import ModelConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Settings

PLACE = "train.parallel"


class ParallelConfig(Settings):
    """How the processes of torchrun divide the work. Loss and gradient stay the same.

    Weights, gradients and optimizer states are sharded over all processes (FSDP2). The number of
    processes must be a multiple of tensor x expert x context.
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
        """The product of the degrees, of which the number of processes is a multiple."""
        return self.tensor * self.expert * self.context


def faults(
    parallel: ParallelConfig, config: ModelConfig, size: int | None = None
) -> list[tuple[str, str, str]]:
    """What does not fit a network, and `size` processes if given.

    Returns:
        (what is wrong, the key to change, what to do) of each fault.
    """
    tensor, expert, context = parallel.tensor, parallel.expert, parallel.context
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    wrong = []
    if size is not None and size % parallel.ranks:
        processes = "1 process is" if size == 1 else f"{size} processes are"
        what = f"{processes} no multiple of tensor x expert x context = {parallel.ranks}."
        do = f"start torchrun with a multiple of {parallel.ranks} processes, or lower the degrees"
        wrong.append((what, "", do))
    if kv_heads % tensor:
        what = f"{kv_heads} key/value heads cannot be divided among {tensor} ranks."
        do = f"choose a divisor of {kv_heads}; `context` divides the query heads further"
        wrong.append((what, "tensor", do))
    if odd := [w for w in _feed_forward_widths(config) if w % tensor]:
        what = f"A feed-forward width of {odd[0]} cannot be divided among {tensor} ranks."
        wrong.append((what, "tensor", "choose a divisor of it"))
    if heads % tensor == 0 and heads // tensor % context:
        local = heads // tensor
        what = f"The {local} query heads of a rank cannot be divided among {context} ranks."
        wrong.append((what, "context", f"choose a divisor of {local}"))
    if expert > 1 and config.num_experts % expert:
        what = f"{config.num_experts} experts cannot be divided among {expert} ranks."
        wrong.append((what, "expert", f"choose a divisor of {config.num_experts}"))
    if expert > 1 and not config.num_experts:
        wrong.append(("A dense network has no experts to divide.", "expert", "set it to 1"))
    return wrong


def _feed_forward_widths(config: ModelConfig) -> set[int]:
    """The widths that tensor parallel cuts; routed experts are not cut."""
    sparse = [config.is_sparse(n) for n in range(config.num_hidden_layers)]
    widths = {config.shared_expert_intermediate_size} if any(sparse) else set()
    return widths if all(sparse) else widths | {config.intermediate_size}


def check(parallel: ParallelConfig, config: ModelConfig, size: int) -> None:
    """Raise OpenQwenError where the degrees do not fit the network or the number of processes."""
    for what, key, do in faults(parallel, config, size):
        raise OpenQwenError(what, where=f"{PLACE}.{key}".rstrip("."), do=do)
