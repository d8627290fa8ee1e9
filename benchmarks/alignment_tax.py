"""What alignment costs: skills lost against reward gained, with AdamW and with online merging.

    python benchmarks/alignment_tax.py runs/seed-1 runs/seed-2 runs/seed-3 --output runs/tax --jobs 2
    python benchmarks/alignment_tax.py runs/seed-1 runs/seed-2 runs/seed-3 --output runs/tax --print

Each RUN is the folder of a finished run of the recipe `tiny`. Seed N starts from the N-th of them
(again from the first after the last): from its SFT model, with its reward model, prompts and pairs.
An arm is a preference stage, a β and an optimizer; the other settings are the recipe's. While an
arm trains, the model is measured every few steps on tasks and text that nothing was trained on, so
one training gives a curve. Each arm and seed is one file in the output folder. The same command
goes on where it was interrupted. It prints a Markdown table and draws `tax.svg`.

The reward of a model is the mean reward of its sampled answers, in standard deviations of the SFT
model's rewards and from its mean on. Two arms are compared where they reach the same reward, between
two measurements by linear interpolation. Square brackets hold 95 % intervals over seeds and items
(see alignment.py).
"""

import argparse
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tax_curves import Curve, draw, table

from openqwen.corpus.documents import halves, read_documents
from openqwen.engine import Engine
from openqwen.engine.score import RewardModel
from openqwen.evaluate import bits_per_byte, checked_accuracy, within_budget
from openqwen.evaluate.checked import sampled_answers
from openqwen.model import Qwen2
from openqwen.recipe.graph import load_stage
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json, write_text
from openqwen.support.generators import Generators
from openqwen.support.page.text import duration
from openqwen.support.settings import Settings
from openqwen.tasks.checkable import generate_tasks, stands_alone
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.dpo import DpoConfig, Pairs, reference_log_probs
from openqwen.train.grpo import GrpoConfig, GrpoTraining
from openqwen.train.online_dpo import OnlineDpoConfig, OnlineDpoTraining
from openqwen.train.order import Epochs
from openqwen.train.parallel import load_for_training
from openqwen.train.preferences import Preferences
from openqwen.train.trainer import Place, Trainer


@dataclass(frozen=True)
class Arm:
    """A preference stage with one optimizer. merging: of `train.merging`; none: AdamW.

    rate: factor of the recipe's learning rate.
    """

    name: str
    stage: str
    beta: float
    merging: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0

    @property
    def folder(self) -> str:
        """Its folder in the output."""
        return f"{self.stage}-beta-{self.beta:g}-{self.name}".replace(" ", "-")


DARE = {"form": "dare", "reserve": 0.5, "alpha": 1e-4}
TIES = {"form": "ties", "reserve": 0.2, "alpha": 1e-4}
# Optimizers at weak β of the online stage; the first three are every other stage's too.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "OnDARE p 0.5 α 1e-4": DARE,
    "OnTIES p 0.2 α 1e-4": TIES,
    "OnDARE p 0.05 α 1e-4": DARE | {"reserve": 0.05},
    "OnDARE p 0.5 α 1e-3": DARE | {"alpha": 1e-3},
    "OnTIES p 0.05 α 1e-4": TIES | {"reserve": 0.05},
    "OnTIES p 0.2 α 1e-3": TIES | {"alpha": 1e-3},
}
ARMS = [Arm(name, "online-dpo", 1e-3, merging) for name, merging in OPTIMIZERS.items()]
for _stage, _beta in (("online-dpo", 0.1), ("dpo", 1e-3)):
    ARMS += [Arm(name, _stage, _beta, OPTIMIZERS[name]) for name in list(OPTIMIZERS)[:3]]


class TaxSettings(Settings):
    """The sections of a recipe that this program reads."""

    online_dpo: OnlineDpoConfig = OnlineDpoConfig()
    dpo: DpoConfig = DpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    evaluate: load_stage("evaluate").config = load_stage("evaluate").config()  # type: ignore[valid-type]


@dataclass
class Probe:
    """Measures a model while it trains, and keeps what it measured in a file.

    run: the run that training starts from. every: steps between measurements. last: the number of
    steps of the training.
    """

    run: Path
    tokenizer: Tokenizer
    settings: TaxSettings
    every: int
    last: int
    path: Path
    about: dict[str, Any]

    def __post_init__(self) -> None:
        size = self.settings.evaluate
        self._reward = RewardModel.load(self.run / "reward")
        self._tasks = generate_tasks(Generators(0)["evaluate"], size.checked, split="heldout")
        documents = read_documents(self.run / "corpus" / "heldout.parquet")
        development, _ = halves([d for d in documents if d["source"] != "tasks"])
        self._documents = within_budget(development, size.heldout_bytes)
        self._points: list[dict[str, Any]] = []
        if self.path.exists():
            self._points = read_json(self.path)["points"]

    def __call__(self, step: int, model: Qwen2) -> None:
        """Measure before a step, if it is the step's turn and nothing is known of it."""
        known = [point["step"] for point in self._points]
        if (step % self.every and step != self.last) or step in known:
            return
        model.eval()
        self._points.append({"step": step} | self._measured(model))
        model.train()
        write_json(self.path, self.about | {"points": self._points})

    @torch.no_grad()
    def _measured(self, model: Qwen2) -> dict[str, Any]:
        """What each task and each document says of the model."""
        size, tasks = self.settings.evaluate, self._tasks
        engine = Engine(model, self.tokenizer)
        text = bits_per_byte(
            model, self.tokenizer, self._documents, size.context, device=model.device
        )
        greedy = checked_accuracy(engine, tasks, size.max_tokens)["answers"]
        sampled = sampled_answers(engine, tasks, size.max_tokens)
        talks = [
            [*task.prompt, {"role": "assistant", "content": answer.text}]
            for task, answer in zip(tasks, sampled)
        ]
        return {
            "reward": self._reward.score(talks),
            "style": [int(stands_alone(answer.text)) for answer in sampled],
            "greedy": [int(answer["correct"]) for answer in greedy],
            "sampled": [int(answer.grade.passed) for answer in sampled],
            "problems": [task.origin["problem"] for task in tasks],
            "bits": text.bits,
            "bytes": text.bytes,
        }


class Measured:
    """Measures a stage's model before its steps; goes in front of the stage's own class."""

    def __init__(self, probe: Probe, *given: Any):
        """See `OnlineTraining`."""
        super().__init__(*given)
        self.probe = probe

    def batch(self, step: int) -> Any:
        """Measure, and make the step's micro-batches."""
        self.probe(step, self.model)
        return super().batch(step)


class MeasuredOnlineDpo(Measured, OnlineDpoTraining):
    """Online DPO that is measured before its steps."""


class MeasuredGrpo(Measured, GrpoTraining):
    """GRPO that is measured before its steps."""


def train_online(kind: Any, config: Any, steps: int, run: Path, place: Place, probe: Probe) -> None:
    """Online DPO or GRPO from a run's SFT model, measured by the probe."""
    prompts = run / "instruct" / "prompts.jsonl"
    training = kind(probe, config, run / "sft", prompts, probe.tokenizer, place, run / "reward")
    training.run(steps)
    probe(steps, training.model)


def train_dpo(config: DpoConfig, run: Path, place: Place, probe: Probe) -> None:
    """DPO on a run's pairs from its SFT model, measured by the probe."""
    generators, model = Generators(place.seed), load_for_training(run / "sft")
    window = model.config.max_position_embeddings
    pairs = run / "prefer" / "preferences.jsonl"
    data = Preferences.read(
        pairs, probe.tokenizer, config, window, place, config.hottest, config.first_difference
    )
    order = Epochs(len(data), config.epochs, config.batch, generators)
    probe.last = order.steps
    groups = {i: data[i] for step in range(order.steps) for i in order.batch(step)}
    start = load_for_training(run / "sft").eval()
    values = reference_log_probs(start, list(groups.values()), config.micro_tokens, place.label)
    parts = values.split([len(group.answers) for group in groups.values()])
    reference = dict(zip(groups, parts, strict=True))

    def batch(step: int) -> list[Pairs]:
        probe(step, model)
        return [
            Pairs.of([groups[i] for i in cut], torch.cat([reference[i] for i in cut]))
            for cut in data.cut(order.batch(step), config.micro_tokens)
        ]

    Trainer(
        place, config, model, batch, lambda p: p.loss(model, config), order.steps, generators
    ).run()
    probe(order.steps, model)


def train_arm(
    arm: Arm, seed: int, run: Path, settings: TaxSettings, path: Path, every: int
) -> None:
    """Train one arm with one seed, from its last state where there is one; `path` gets the points."""
    config = getattr(settings, arm.stage.replace("-", "_")).model_copy(deep=True)
    base = run / ("extend" if (run / "extend").exists() else "pretrain")
    merging = {"base": base, **arm.merging} if arm.merging else {}
    train = config.train.model_dump() | {"merging": merging}
    train["learning_rate"] *= arm.rate
    config = type(config)(
        **config.model_dump(exclude={"beta", "train"}), beta=arm.beta, train=train
    )
    work = path.with_suffix("")
    place = Place(work / "model", work / "scratch", seed, f"{arm.folder} seed {seed}", run / "sft")
    tokenizer = load_tokenizer(run / "sft")
    steps = config.episodes if arm.stage == "grpo" else getattr(config, "steps", 0)
    probe = Probe(run, tokenizer, settings, every, steps, path, asdict(arm) | {"seed": seed})
    trainings: dict[str, Callable[[], None]] = {
        "dpo": partial(train_dpo, config, run, place, probe),
        "online-dpo": partial(train_online, MeasuredOnlineDpo, config, steps, run, place, probe),
        "grpo": partial(train_online, MeasuredGrpo, config, steps, run, place, probe),
    }
    start = time.monotonic()
    trainings[arm.stage]()
    write_json(path, read_json(path) | {"finished": True})
    shutil.rmtree(work)
    print(f"{place.label}: {duration(time.monotonic() - start)}", file=sys.stderr, flush=True)


def read_curves(arms: Sequence[Arm], seeds: Sequence[int], output: Path) -> list[Curve]:
    """The arms whose seeds are all finished."""
    curves = []
    for arm in arms:
        files = [output / arm.folder / f"seed-{seed}.json" for seed in seeds]
        if all(is_finished(file) for file in files):
            group = f"{arm.stage}, β {arm.beta:g}"
            curves.append(Curve(arm.name, group, [read_json(file)["points"] for file in files]))
    return curves


def is_finished(path: Path) -> bool:
    """Whether an arm's file holds a whole training."""
    return path.exists() and read_json(path).get("finished", False)


def check_run(run: Path) -> None:
    """Raise OpenQwenError where a run lacks what the arms start from."""
    needed = ("sft/config.json", "reward/config.json", "instruct/prompts.jsonl")
    for name in (*needed, "prefer/preferences.jsonl", "corpus/heldout.parquet"):
        if not (run / name).exists():
            what, do = f"This run has no {name}.", "give the folder of a finished run of `tiny`"
            raise OpenQwenError(what, where=run, do=do)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not finished; print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs of `tiny`")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--recipe", default="alignment-tax", help="settings of stages and sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=8, help="steps between measurements")
    parser.add_argument(
        "--arms", nargs="+", help="only arms whose folder names contain one of these"
    )
    parser.add_argument("--stages", nargs="+", help="train all default optimizers in these stages")
    parser.add_argument("--betas", type=float, nargs="+", default=[1e-3], help="of --stages")
    parser.add_argument("--jobs", type=int, default=1, help="arms at once, with a thread each")
    parser.add_argument("--print", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    for run in options.runs:
        check_run(run)
    arms = ARMS
    if options.stages:
        arms = [
            Arm(name, stage, beta, merging)
            for stage in options.stages
            for beta in options.betas
            for name, merging in OPTIMIZERS.items()
        ]
    if options.arms:
        arms = [arm for arm in arms if any(text in arm.folder for text in options.arms)]
    settings = load_settings(find_recipe(options.recipe), TaxSettings)
    work = []
    for number, seed in enumerate(options.seeds):
        run = options.runs[number % len(options.runs)]
        for arm in arms:
            path = options.output / arm.folder / f"seed-{seed}.json"
            if not options.print and not is_finished(path):
                work.append((arm, seed, run, settings, path, options.every))
    if options.jobs == 1 or len(work) < 2:
        for arguments_of_arm in work:
            train_arm(*arguments_of_arm)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, spawn, torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(train_arm, *one) for one in work]:
                done.result()
    curves = read_curves(arms, options.seeds, options.output)
    if not curves:
        raise SystemExit(f"no arm is finished for all seeds in {options.output}")
    write_text(options.output / "tax.svg", draw(curves))
    print(table(curves))
    print(f"\ncurves: {options.output / 'tax.svg'}", file=sys.stderr)


if __name__ == "__main__":
    main()
