"""The `extend` stage: longer rows and a higher RoPE base (Qwen2 report, 2.3)."""

from openqwen.support.stage import CORPUS, MODEL, TOKENS, Stage, StageRun
from openqwen.tokenizer import load_tokenizer
from openqwen.train.pretrain import ExtendConfig, pretrain_on_shards, staged_effort


def run_extend(run: StageRun) -> dict[str, float]:
    """A base model → one with a longer context."""
    start = run.inputs["model"]
    return pretrain_on_shards(run, start, load_tokenizer(start))


STAGE = Stage(
    name="extend",
    help="Lengthen the context: longer rows, higher RoPE base.",
    config=ExtendConfig,
    inputs={"model": MODEL, "tokens": TOKENS, "corpus": CORPUS},
    outputs=["model"],
    run=run_extend,
    trains_on_ranks=True,
    estimate=lambda recipe, roles: staged_effort(recipe.extend),
)
