"""What a stage is: a function from artifacts to an artifact.

Each stage is declared once, at the end of the file that does its work:

    STAGE = Stage(name="sft", help="Supervised fine-tuning.", config=SftConfig, run=run_sft, ...)

The command line, the recipe's settings, the runner, the report, the planner and the ranks under
torchrun are derived from that declaration. One line in `recipe/graph.py` gives its place in a
recipe.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

CONVERSATION = 45  # tokens of a short conversation, for estimates

CHAT = "chat"  # an output of stages whose model can chat
_FILE = "a .jsonl, .json or .parquet file, hub:owner/name[:split]"
# Descriptions of inputs that several stages have.
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
    """The arguments of one run of a stage.

    The same config, seed and input bytes must give the same output bytes.

    Args:
        config: the stage's settings.
        inputs: role -> folder or file to read.
        output: an empty folder for the payload, renamed into place when the stage returns.
        scratch: a folder that survives kills until the stage is finished. Training states are saved
            here; a stage that finds one continues from it.
        seed: of all random generators.
        label: the stage's name in messages.
    """

    config: Any
    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    seed: int
    label: str

    def data(self, role: str) -> Path:
        """The file of an input of records: the input itself, or `<role>.jsonl` in an artifact."""
        given = self.inputs[role]
        return given / f"{role}.jsonl" if given.is_dir() else given


@dataclass(frozen=True)
class Effort:
    """An estimate of a stage's work before it runs; `recipe/estimate.py` converts it to seconds.

    Args:
        seconds: of work without a network.
        answers: short answers to sample.
        rows: length of a row -> tokens to train on in rows of that length.
        micro_tokens: tokens of the largest forward call.
        longest: tokens of the longest record.
        beside: other networks in memory while one trains, such as a reference model.
        data_from: the section of the recipe that says how much data is made; a recipe without that
            section trains on the user's data.
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
    """The declaration of a stage.

    `name` and `help` must be literals: `openqwen --help` reads them without importing the file.

    Args:
        name: on the command line, in a recipe and in messages.
        help: one line for the command line; a stage without it runs in recipes only.
        config: class of its settings, whose section in a recipe has the stage's name.
        inputs: role -> description of what to give.
        optional: the inputs that it can do without.
        outputs: roles that its artifact can fill in later stages.
        run: does the work and returns metrics, the most important first.
        trains_on_ranks: under torchrun every rank calls `run`, otherwise only the first one does.
            Its settings are a `TrainingConfig`.
        estimate: computes its effort from the recipe's settings and the roles that are given.
    """

    name: str
    help: str
    config: type[BaseModel]
    inputs: Mapping[str, str]
    outputs: Sequence[str]
    run: Callable[[StageRun], dict[str, float]]
    trains_on_ranks: bool = False
    estimate: Callable[[Any, Collection[str]], Effort] | None = None
    optional: Collection[str] = ()
