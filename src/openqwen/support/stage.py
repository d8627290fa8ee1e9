"""What a stage is: a function from artifacts to an artifact.

It is declared at the end of the file that does its work:

    STAGE = Stage(name="sft", help="Supervised fine-tuning.", config=SftConfig, run=run_sft, ...)

The command line, the recipe's settings, the runner, the report, the planner and torchrun's ranks
are all derived from that declaration. `recipe/graph.py` has one line for it, which says where in a
recipe it stands.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

CONVERSATION = 45  # tokens of a short conversation, for estimates

CHAT = "chat"  # among the outputs of a stage: its model can be talked to
_FILE = "a .jsonl, .json or .parquet file, hub:owner/name[:split]"
# What to give for the inputs that several stages have.
CORPUS = "A corpus artifact."
TOKENIZER = "A folder with a tokenizer."
TOKENS = "Token shards."
MODEL = "The model: a Hugging Face folder, a .gguf file or a hub id."
DEMONSTRATIONS = f"Demonstrations D: {_FILE}, or an instruct artifact."
PREFERENCES = f"Preferences P: {_FILE}, or a prefer artifact."
REWARD = "A reward model."
PROMPTS = f"Prompts: {_FILE}, or an instruct artifact."


@dataclass(frozen=True)
class StageRun:
    """What one run of a stage gets.

    inputs: role -> folder or file to read. output: an empty folder for the payload, renamed into
    place when the stage returns. scratch: a folder that survives kills until the stage is finished;
    training states go here, and a stage that finds one continues from it. Same config, seed and
    input bytes must give the same output bytes.
    """

    config: Any
    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    seed: int
    label: str

    def data(self, role: str) -> Path:
        """An input of records: the file itself, or `<role>.jsonl` in the artifact that holds it."""
        given = self.inputs[role]
        return given / f"{role}.jsonl" if given.is_dir() else given


@dataclass(frozen=True)
class Effort:
    """What a stage has to do, before it has ever run; `recipe/estimate.py` makes seconds of it.

    seconds: of work that is no network's. answers: short answers to sample. rows: length of a row
    -> tokens to train on in such rows. micro_tokens: of the largest forward call. longest: tokens
    of the longest record. beside: whole networks that stand beside the one that trains. data_from:
    the section of the recipe that says how much data is made; a recipe without it trains on the
    user's own.
    """

    seconds: float = 0.0
    answers: float = 0.0
    rows: Mapping[int, float] = field(default_factory=dict)
    micro_tokens: int = 0
    longest: int = 0
    beside: int = 0
    data_from: str | None = None


@dataclass(frozen=True)
class Stage:
    """A stage's declaration.

    help: one line for the command line; a stage without it runs in a recipe only. config: its
    settings; their section in a recipe bears the stage's name. inputs: role -> what to give for it.
    outputs: the roles that its artifact can fill in later stages. run: returns the metrics, the
    most telling first. trains_on_ranks: under torchrun every rank calls `run`, otherwise only the
    first; its settings are a `TrainingConfig`. estimate: its effort, from a recipe's settings and
    the roles that it is given. `name` and `help` are literals: `openqwen --help` reads them without
    loading the file.
    """

    name: str
    help: str
    config: type[BaseModel]
    inputs: Mapping[str, str]
    outputs: Sequence[str]
    run: Callable[[StageRun], dict[str, float]]
    trains_on_ranks: bool = False
    estimate: Callable[[Any, Collection[str]], Effort] | None = None
