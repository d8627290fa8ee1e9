"""`openqwen upcycle`: make a mixture of fine-grained experts from a dense checkpoint."""

from typing import Literal

from pydantic import Field

from openqwen.model import load_model, save_checkpoint
from openqwen.model.upcycle import Upcycling, upcycle
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Settings
from openqwen.support.stage import Stage, StageRun
from openqwen.tokenizer import load_tokenizer


class UpcycleConfig(Settings):
    """The experts. The defaults are the 57B-A14B's, in proportion to the dense width F."""

    experts: int = Field(64, gt=0, description="routed experts of each layer")
    experts_per_token: int = Field(
        8, gt=0, description="routed experts that a token passes through"
    )
    expert_width: int | None = Field(
        None,
        gt=0,
        description="width of one routed expert; none: F × 2,560 / 18,944, a multiple of 16",
    )
    shared_width: int | None = Field(
        None,
        gt=0,
        description="width of the shared expert; none: eight expert widths, and at least F",
    )
    reinit: float = Field(
        0.5, ge=0, le=1, description="share of each routed expert's channels drawn anew"
    )
    keep_output: bool = Field(
        True, description="scale the shared expert so that it starts as the dense network"
    )
    vocabulary_rows: int | None = Field(
        None,
        gt=0,
        description="embedding rows to keep, the rest is padding; none: all"
        " (57B-A14B: 151,936 of 152,064)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision to load, work in and save"
    )


def run_upcycle(run: StageRun) -> dict[str, float]:
    """A dense checkpoint → a mixture of experts, with the same tokenizer."""
    config: UpcycleConfig = run.config
    source = run.inputs["model"]
    tokenizer = load_tokenizer(source)
    if config.vocabulary_rows is not None and config.vocabulary_rows < tokenizer.vocab_size:
        raise OpenQwenError(
            f"{config.vocabulary_rows} embedding rows are fewer than the tokenizer's"
            f" {tokenizer.vocab_size} tokens.",
            where="--vocabulary-rows",
            do="give at least as many rows, or leave the flag out to keep all",
        )
    plan = Upcycling(**config.model_dump(exclude={"dtype"}))
    dense = load_model(source, dtype=config.dtype)
    model = upcycle(dense, plan, run.seed)
    save_checkpoint(model, tokenizer, run.output)
    size = model.config
    routed, width = size.num_experts * size.moe_intermediate_size, dense.config.intermediate_size
    return {
        "parameters": size.parameters(),
        "active_parameters": size.parameters(active=True),
        "expert_width": size.moe_intermediate_size,
        "shared_width": size.shared_expert_intermediate_size,
        "copies": -(-routed // width),
        "discarded_channels": -routed % width,
    }


STAGE = Stage(
    name="upcycle",
    help="A dense network to a mixture of fine-grained experts.",
    config=UpcycleConfig,
    inputs={"model": "The dense Hugging Face folder."},
    outputs=["model"],
    run=run_upcycle,
)
