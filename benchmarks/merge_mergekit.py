"""`openqwen merge` against mergekit 0.1.5 on random checkpoints; prints the largest differences.

mergekit is LGPL and has its own environment:

    python3 -m venv peers/mergekit
    peers/mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/merge_mergekit.py --mergekit peers/mergekit/bin/mergekit-yaml

linear, SLERP, task arithmetic and TIES must agree up to float32's rounding. DARE need not: its masks
are random, and mergekit scales what is kept to the L1 norm of the whole task vector where we, as the
paper, divide by the share. The script prints the norms of both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

WEIGHTS, DENSITY, T, SCALE = (0.7, 0.4), 0.3, 0.35, 0.8
NAMES = ("base", "one", "two")


def make(folder: Path) -> None:
    """Three checkpoints: a base and two that lie near it."""
    tokenizer = train_tokenizer(["one two three four five"] * 20, TokenizerConfig(vocabulary=300))
    config = ModelConfig(384, 64, 96, 3, 4, 2, max_position_embeddings=64)
    base = Qwen2(config)
    initialize(base, torch.Generator().manual_seed(0))
    for number, name in enumerate(NAMES):
        model = Qwen2(config)
        model.load_state_dict(base.state_dict())
        noise = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += number * 0.01 * torch.randn(parameter.shape, generator=noise)
        save_checkpoint(model, tokenizer, folder / name)


def theirs(method: str, folder: Path) -> dict[str, object]:
    """mergekit's configuration of a merge."""
    base, *models = ({"model": str(folder / name)} for name in NAMES)
    if method == "slerp":
        return {
            "merge_method": method,
            "models": [base, models[0]],
            "base_model": base["model"],
            "parameters": {"t": T},
            "dtype": "float32",
        }
    parts = [
        {**m, "parameters": {"weight": w, "density": DENSITY}} for m, w in zip(models, WEIGHTS)
    ]
    if method == "linear":
        parts = [{**base, "parameters": {"weight": 1.0}}]
        parts += [{**m, "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS)]
    name = {"task-arithmetic": "task_arithmetic", "dare": "dare_linear"}.get(method, method)
    shared = {} if method == "linear" else {"parameters": {"lambda": SCALE}}
    based = {} if method == "linear" else {"base_model": base["model"]}
    return {"merge_method": name, "models": parts, "dtype": "float32", **based, **shared}


def ours(method: str, folder: Path) -> list[str]:
    """The arguments of our command."""
    base, one, two = (str(folder / name) for name in NAMES)
    if method == "slerp":
        return [base, one, "--method", method, "--t", str(T)]
    weights = [*map(str, WEIGHTS)]
    given = ["1", *weights] if method == "linear" else weights
    flags = ["--method", method, "--weights", *given, "--density", str(DENSITY)]
    return [base, one, two, *flags, "--scale", str(SCALE)]


def main() -> None:
    """Merge by both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", required=True, help="the program mergekit-yaml")
    program = parser.parse_args().mergekit
    failed = False
    # mergekit's own environment must not see ours.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        base = load_model(folder / "base").state_dict()
        for method in ("linear", "slerp", "task-arithmetic", "ties", "dare"):
            recipe, output = folder / f"{method}.yaml", folder / f"{method}-theirs"
            recipe.write_text(json.dumps(theirs(method, folder)))  # JSON is YAML
            command = [program, str(recipe), str(output), "--random-seed", "1"]
            subprocess.run(command, check=True, capture_output=True, env=clean)
            mine = folder / f"{method}-ours"
            command = [sys.executable, "-m", "openqwen.cli", "merge", *ours(method, folder)]
            subprocess.run([*command, "--output", str(mine)], check=True, capture_output=True)
            right, found = (load_model(path).state_dict() for path in (output, mine))
            assert right.keys() == found.keys()
            largest = max(float((found[n] - right[n]).abs().max()) for n in right)
            if method == "dare":
                norms = [
                    sum(float((state[n] - base[n]).abs().sum()) for n in base)
                    for state in (found, right)
                ]
                print(f"dare: L1 norm of the change {norms[0]:.4f}, mergekit's {norms[1]:.4f}")
            else:
                failed |= largest > 1e-6
                print(f"{method}: largest difference {largest:.1e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
