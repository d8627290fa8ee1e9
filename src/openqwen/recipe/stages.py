"""The recipe itself: which stages there are, what flows between them, and the settings of each.

    corpus → tokenizer → tokens → pretrain → extend → instruct → sft → prefer → reward → dpo, online-dpo

Both preference stages start from the SFT model, so that each can be told from the other.
After each stage that makes a model stands an `evaluate-…` stage that scores it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel, Field

from openqwen.corpus import CorpusConfig, build_corpus, write_shards
from openqwen.corpus.documents import read_documents
from openqwen.corpus.mixture import sample
from openqwen.engine import Engine
from openqwen.evaluate.config import EvaluateConfig
from openqwen.instruct.synthesize.demonstrations import InstructConfig, build_demonstrations
from openqwen.instruct.synthesize.preferences import PreferConfig, build_preferences
from openqwen.instruct.synthesize.pretraining_tasks import task_documents
from openqwen.model import load_model
from openqwen.recipe import sweep, upcycle
from openqwen.recipe.estimate import Estimates
from openqwen.recipe.evaluation import evaluate_model, evaluate_reward
from openqwen.recipe.pretraining import run_extend, run_pretrain
from openqwen.recipe.report import write_report
from openqwen.recipe.stage import Stage, Verb, Work, outside_of
from openqwen.support.command import command
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.settings import Settings
from openqwen.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, tokenizer_statistics, train_tokenizer
from openqwen.train.dpo import DpoConfig, dpo
from openqwen.train.online_dpo import OnlineDpoConfig, online_dpo
from openqwen.train.pretrain import ExtendConfig, PretrainConfig
from openqwen.train.reward import RewardConfig, reward
from openqwen.train.sft import SftConfig, sft
from openqwen.train.sweep import SweepConfig
from openqwen.train.trainer import Place


class CorpusStageConfig(CorpusConfig):
    """The corpus, and the multi-task instruction data that Qwen2 mixes into pre-training (Qwen2 report, 3.1)."""

    task_documents: int = Field(1_000, ge=0, description="documents of solved tasks mixed in, as the source 'tasks'")


class TokensConfig(Settings):
    """Text to token ids; everything is decided by the tokenizer."""


class Recipe(Settings):
    """Everything a run depends on."""

    seed: int = Field(1, ge=0, description="of every random draw")
    corpus: CorpusStageConfig = Field(default_factory=CorpusStageConfig, description="raw documents to a corpus")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="the vocabulary")
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig, description="pre-training")
    extend: ExtendConfig = Field(default_factory=ExtendConfig, description="the long-sequence phase")
    instruct: InstructConfig = Field(default_factory=InstructConfig, description="demonstrations D")
    sft: SftConfig = Field(default_factory=SftConfig, description="supervised fine-tuning on D")
    prefer: PreferConfig = Field(default_factory=PreferConfig, description="preferences P")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="the reward model, on P")
    dpo: DpoConfig = Field(default_factory=DpoConfig, description="direct preference optimisation on P")
    online_dpo: OnlineDpoConfig = Field(default_factory=OnlineDpoConfig, description="online DPO with the reward model")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="the scores after each stage")


def _engine(folder: Path) -> tuple[Engine, Tokenizer]:
    tokenizer = load_tokenizer(folder)
    return Engine(load_model(folder, device=best_device()), tokenizer), tokenizer


def run_corpus(work: Work) -> dict[str, float]:
    """Raw documents → train.parquet, heldout.parquet, corpus.json."""
    tasks = task_documents(work.seed, work.config.task_documents)
    return build_corpus(work.config, tasks, work.output, work.seed)


def run_tokenizer(work: Work) -> dict[str, float]:
    """A sample of the corpus's training documents, by the weights of the mixture → a vocabulary."""
    config, documents = work.config, work.inputs["corpus"] / "train.parquet"
    sources = read_json(work.inputs["corpus"] / "corpus.json")["sources"]
    if unknown := sorted(config.weights.keys() - sources.keys()):
        raise OpenQwenError(
            f"The corpus has no source '{unknown[0]}'.",
            where="tokenizer.weights",
            do=f"name some of its sources: {', '.join(sources)}",
        )
    weights = {
        name: config.weights.get(name, 1.0) * source["weight"] / source["bytes"]
        for name, source in sources.items()
        if source["bytes"]
    }
    chosen = sample(read_documents(documents), weights, config.max_bytes, work.seed)
    numbered = enumerate(read_documents(documents))
    texts = (document["text"] for number, document in numbered if number in chosen)
    tokenizer = train_tokenizer(texts, config)
    tokenizer.save(work.output)
    held: dict[str, list[str]] = {}
    for document in read_documents(work.inputs["corpus"] / "heldout.parquet"):
        held.setdefault(document["source"], []).append(document["text"])
    trained = min(config.max_bytes, sum(source["bytes"] for source in sources.values()))
    statistics = tokenizer_statistics(tokenizer, held, trained)
    write_json(work.output / "statistics.json", statistics)
    rates = statistics["bytes_per_token"]
    return {"bytes_per_token": sum(rates.values()) / len(rates), "vocabulary": tokenizer.vocab_size}


def run_tokens(work: Work) -> dict[str, float]:
    """The corpus's training documents → token shards."""
    table = write_shards(work.inputs["corpus"] / "train.parquet", load_tokenizer(work.inputs["tokenizer"]), work.output)
    return {what: sum(s[what] for s in table.values()) for what in ("tokens", "documents")}


def run_instruct(work: Work) -> dict[str, float]:
    """Documents and the base model's own samples → demonstrations D."""
    documents = (d for d in read_documents(work.inputs["corpus"] / "train.parquet") if d["source"] != "tasks")
    engine, _ = _engine(work.inputs["model"])
    return build_demonstrations(work.config, documents, engine, work.seed, work.output, work.inputs["model"].name)


def run_prefer(work: Work) -> dict[str, float]:
    """The chat model's checked samples → preferences P."""
    engine, _ = _engine(work.inputs["model"])
    return build_preferences(work.config, engine, work.seed, work.output, work.inputs["model"].name)


def _train(train: Callable[..., dict[str, float]], role: str, others: Sequence[str], work: Work) -> dict[str, float]:
    """Train the input `model` on data, given as itself or as the artifact that holds it."""
    start, given = work.inputs["model"], work.inputs[role]
    data = given / f"{role}.jsonl" if given.is_dir() else given
    place = Place(work.output, work.scratch, work.seed, work.label)
    return train(work.config, start, data, load_tokenizer(start), place, *(work.inputs[o] for o in others))


run_sft = partial(_train, sft, "demonstrations", ())
run_reward = partial(_train, reward, "preferences", ())
run_dpo = partial(_train, dpo, "preferences", ())
run_online_dpo = partial(_train, online_dpo, "prompts", ("reward",))
Run = Callable[[Work], dict[str, float]]
# What the scores of an aligned model stand beside: `start` is the model that it was trained from.
_ALIGNED = {"base": "evaluate-extend", "start": "evaluate-sft", "reward": "reward"}
_GRAPH: list[tuple[str, Run, dict[str, str]]] = [
    ("corpus", run_corpus, {}),
    ("tokenizer", run_tokenizer, {"corpus": "corpus"}),
    ("tokens", run_tokens, {"corpus": "corpus", "tokenizer": "tokenizer"}),
    ("pretrain", run_pretrain, {"tokens": "tokens", "tokenizer": "tokenizer", "corpus": "corpus"}),
    ("evaluate-pretrain", evaluate_model, {"model": "pretrain", "corpus": "corpus"}),
    ("extend", run_extend, {"model": "pretrain", "tokens": "tokens", "corpus": "corpus"}),
    ("evaluate-extend", evaluate_model, {"model": "extend", "corpus": "corpus"}),
    ("instruct", run_instruct, {"corpus": "corpus", "model": "extend"}),
    ("sft", run_sft, {"model": "extend", "demonstrations": "instruct"}),
    ("evaluate-sft", evaluate_model, {"model": "sft", "corpus": "corpus", "base": "evaluate-extend"}),
    ("prefer", run_prefer, {"model": "sft"}),
    ("reward", run_reward, {"model": "sft", "preferences": "prefer"}),
    ("evaluate-reward", evaluate_reward, {"reward": "reward", "preferences": "prefer"}),
    ("dpo", run_dpo, {"model": "sft", "preferences": "prefer"}),
    ("evaluate-dpo", evaluate_model, {"model": "dpo", "corpus": "corpus", **_ALIGNED}),
    ("online-dpo", run_online_dpo, {"model": "sft", "reward": "reward", "prompts": "instruct"}),
    ("evaluate-online-dpo", evaluate_model, {"model": "online-dpo", "corpus": "corpus", **_ALIGNED}),
]


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in the order they run."""
    estimates = Estimates(recipe)
    stages: list[Stage] = []
    for name, run, inputs in _GRAPH:
        kind = "evaluate" if run is evaluate_model else name
        field = "evaluate" if run in (evaluate_model, evaluate_reward) else name.replace("-", "_")
        config = TokensConfig() if name == "tokens" else getattr(recipe, field)
        folder = recipe.corpus.folder if name == "corpus" else None
        outside = {"folder": folder} if folder else {} if field == "evaluate" else outside_of(config)
        stages.append(Stage(name, kind, config, run, inputs, outside, estimates.of(name)))
    return stages


def finish(run_folder: Path) -> list[str]:
    """Write the report; the lines that end a run."""
    lines = [f"report   {write_report(run_folder)}"]
    models = [name for name in ("online-dpo", "dpo", "sft") if (run_folder / name).exists()]
    return [*lines, f"chat     {command('chat', run_folder / models[0])}"] if models else lines


_FILE = "a .jsonl, .json or .parquet file, hub:owner/name[:split]"
_GIVEN = {  # role -> what to give for it
    "corpus": "A corpus artifact.",
    "tokenizer": "A folder with a tokenizer.",
    "tokens": "Token shards.",
    "model": "The model: a Hugging Face folder, a .gguf file or a hub id.",
    "demonstrations": f"Demonstrations D: {_FILE}, or an instruct artifact.",
    "preferences": f"Preferences P: {_FILE}, or a prefer artifact.",
    "reward": "A reward model.",
    "prompts": f"Prompts: {_FILE}, or an instruct artifact.",
}


def _verb(about: str, config: type[BaseModel], run: Run, roles: str = "", **others: str) -> Verb:
    return Verb(about, config, {role: _GIVEN[role] for role in roles.split()} | others, run)


_SHARDS = "tokens tokenizer corpus"
_PRETRAIN = "Train a network on token shards, from scratch or from --model; with --sweep, see the verb sweep."
_EXTEND = "Lengthen the context: longer rows, raised RoPE base."
_ONLINE = "DPO on the model's own answers, judged by the reward model."
VERBS: dict[str, Verb] = {
    "corpus": _verb("Raw documents to cleaned, filtered, deduplicated text.", CorpusStageConfig, run_corpus),
    "tokenizer": _verb("Train the byte-level BPE vocabulary.", TokenizerConfig, run_tokenizer, "corpus"),
    "tokens": _verb("Text to shards of token ids.", TokensConfig, run_tokens, "corpus tokenizer"),
    "pretrain": _verb(_PRETRAIN, PretrainConfig, run_pretrain, _SHARDS),
    "sweep": _verb(sweep.HELP, SweepConfig, sweep.run_sweep, _SHARDS),
    "extend": _verb(_EXTEND, ExtendConfig, run_extend, "model tokens corpus"),
    "upcycle": _verb(upcycle.HELP, upcycle.UpcycleConfig, upcycle.run_upcycle, model="The dense Hugging Face folder."),
    "instruct": _verb("Make demonstrations without people.", InstructConfig, run_instruct, "corpus model"),
    "sft": _verb("Supervised fine-tuning on demonstrations.", SftConfig, run_sft, "model demonstrations"),
    "prefer": _verb("Make preference pairs by sampling and checking.", PreferConfig, run_prefer, "model"),
    "reward": _verb("Train a reward model on preference pairs.", RewardConfig, run_reward, "model preferences"),
    "dpo": _verb("Direct preference optimization on preference pairs.", DpoConfig, run_dpo, "model preferences"),
    "online-dpo": _verb(_ONLINE, OnlineDpoConfig, run_online_dpo, "model reward prompts"),
    "evaluate": _verb("Score a model.", EvaluateConfig, evaluate_model, "model corpus"),
}
