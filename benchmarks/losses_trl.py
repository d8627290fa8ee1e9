"""The preference losses and GRPO against TRL's, on the same float64 tensors: values and gradients.

    python -m venv peers && peers/bin/pip install torch==2.13.0 trl==1.16.0     # the CPU build of torch
    PYTHONPATH=src peers/bin/python benchmarks/losses_trl.py

TRL's own `_compute_loss` runs, with a stand-in for the network that returns given log-probabilities.
Ours are divided by their count, as the trainer does. Exits with 1 if a difference exceeds 1e-8.
"""

import sys
from collections import defaultdict
from functools import partial
from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from openqwen.train import losses

BOUND = 1e-8
LENGTHS = [3, 7, 1, 5, 6, 2, 4, 7]
WIDTH, BETA = max(LENGTHS), 0.3
torch.manual_seed(1)
torch.set_default_dtype(torch.float64)
MASK = torch.tensor([[1] * n + [0] * (WIDTH - n) for n in LENGTHS])


def drawn(scale=1.0):
    """Log-probabilities of the answers' tokens, [answers, WIDTH], 0 behind an answer's end."""
    return -scale * torch.rand(len(LENGTHS), WIDTH) * MASK


def stub(**fields):
    """What a TRL trainer needs of itself; metrics go nowhere."""
    accelerator = MagicMock(device=torch.device("cpu"), num_processes=1)
    for name in ("gather", "gather_for_metrics", "reduce"):
        setattr(accelerator, name, lambda value, *_, **__: value)
    metrics = defaultdict(lambda: defaultdict(list))
    shared = {"accelerator": accelerator, "_metrics": metrics, "aux_loss_enabled": False}
    shared |= {"_total_train_tokens": 0, "_tp_size": 1, "beta": BETA}
    return SimpleNamespace(**shared | fields)


def network(log_probs):
    """A stand-in that returns these log-probabilities for the tokens behind a prompt of one."""
    zeros = torch.zeros_like(log_probs)
    outputs = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), zeros) | {
        "is_top1": zeros.bool()
    }
    return MagicMock(return_value=SimpleNamespace(log_probs=log_probs, **outputs), training=True)


def batch(rows):
    """Inputs of so many rows: a prompt of one token, then the answer."""
    ones = torch.ones(rows, WIDTH + 1, dtype=torch.long)
    mask = torch.cat([torch.zeros(rows, 1, dtype=torch.long), MASK[:rows]], 1)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}


def trl_dpo(policy, reference, loss_type):
    """TRL's loss; the first half of the rows are chosen answers."""
    model, fixed = network(policy), network(reference)
    trainer = stub(
        model=model, ref_model=fixed, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None
    )
    trainer.precompute_ref_logps, trainer.f_divergence_type, trainer.use_weighting = (
        False,
        "reverse_kl",
        False,
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False)
    return DPOTrainer._compute_loss(trainer, model, batch(len(LENGTHS)), False)


def pairs(log_probs):
    """Sums over tokens as [pairs, 2]."""
    return log_probs.sum(1).view(2, -1).T


def trl_kto(policy, reference, others, labels):
    """TRL's loss; others: log-probabilities of mismatched answers by policy and reference."""
    model = network(policy)
    trainer = stub(model=model, calculate_KL=True, precompute_ref_logps=True, loss_type="kto")
    trainer.desirable_weight, trainer.undesirable_weight = 1.3, 0.7
    trainer._compute_kl_logps = lambda *_: others[0].sum(1)
    inputs = batch(len(LENGTHS)) | {"label": labels, "ref_logps": reference.sum(1)}
    inputs |= {"ref_KL_logps": others[1].sum(1), "KL_input_ids": None}
    return KTOTrainer._compute_loss(trainer, model, inputs, False)


def trl_grpo(policy, old, reference, sampler, advantages, loss_type, clip):
    """TRL's loss with its vLLM correction, truncated per token at 2."""
    model = network(policy)
    trainer = stub(model=model, loss_type=loss_type, epsilon_low=clip[0], epsilon_high=clip[1])
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.importance_sampling_level, trainer.max_completion_length = "token", 9
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = sampler is not None
    trainer.current_gradient_accumulation_steps, trainer._entropy_bonus_enabled = 1, False
    trainer.beta = 0.0 if reference is None else BETA
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        policy,
        torch.zeros_like(policy),
        None,
    )
    inputs = {"prompt_ids": MASK[:, :1], "prompt_mask": MASK[:, :1]}
    inputs |= {"completion_ids": MASK, "completion_mask": MASK, "advantages": advantages}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
    inputs |= {"num_items_in_batch": MASK.sum()}
    if sampler is not None:
        inputs["importance_sampling_ratio"] = (old - sampler).exp().clamp(max=2.0)
    return GRPOTrainer._compute_loss(trainer, model, inputs)


def our_kto(policy, reference, labels, z):
    """Ours on the same numbers."""
    return losses.kto(policy.sum(1), reference.sum(1), labels, z, BETA, 1.3, 0.7)


def our_grpo(policy, old, reference, sampler, advantages, aggregate, clip):
    """Ours on the same numbers."""
    tokens = [packed(values) for values in (old, reference, sampler)]
    settings = {"beta": BETA, "clip": clip, "aggregate": aggregate, "longest": 9}
    return losses.grpo(packed(policy), advantages, LENGTHS, *tokens, **settings)


def packed(values):
    """The answers' tokens end to end."""
    return None if values is None else values[MASK.bool()]


def compare(name, ours, theirs, policy):
    """Print the differences of value and gradient; return whether both are small."""
    loss = ours()
    (mine,) = torch.autograd.grad(loss.sum / loss.count, policy)
    value = theirs()
    (right,) = torch.autograd.grad(value, policy)
    apart = abs((loss.sum / loss.count - value).item()), float((mine - right).abs().max())
    print(f"{name:<44} value {value.item():+.6f}  apart {apart[0]:.1e}  gradient {apart[1]:.1e}")
    return max(apart) <= BOUND


def main():
    """Compare all; exit with 1 where one differs."""
    policy, reference = drawn().requires_grad_(), drawn()
    lengths = torch.tensor(LENGTHS).view(2, -1).T
    good = []

    def offline(name, theirs, ours):
        good.append(compare(name, ours, lambda: trl_dpo(policy, reference, theirs), policy))

    def given():
        return pairs(policy), pairs(reference), BETA

    offline("dpo", "sigmoid", lambda: losses.dpo(*given()))
    offline(
        "dpo, length-normalised (sigmoid_norm)",
        "sigmoid_norm",
        lambda: losses.dpo(*given(), 0.0, lengths),
    )
    offline("ipo, length-normalised", "ipo", lambda: losses.ipo(*given(), lengths))
    labels = torch.tensor([True, False, False, True, True, False, True, False])
    for name, others in (
        ("kto", (drawn(0.2), drawn())),
        ("kto, divergence below 0", (drawn(), drawn(0.2))),
    ):
        z = float((others[0] - others[1]).sum(1).mean())
        mine = partial(our_kto, policy, reference, labels, z)
        good.append(
            compare(name, mine, partial(trl_kto, policy, reference, others, labels), policy)
        )
    advantages = torch.tensor([1.2, -0.4, -0.8, 0.0, 0.7, 0.7, -1.4, 0.0])
    old, sampler = policy.detach() + 0.5 * torch.randn_like(policy) * MASK, drawn()
    variants = (("answer", "grpo"), ("token", "dapo"), ("constant", "dr_grpo"))
    clips = ((0.2, 0.2), (0.2, 0.28))
    for (aggregate, name), clip, ref, told in product(
        variants, clips, (None, reference), (None, sampler)
    ):
        tag = f"{name}, clip {clip[1]}, {'no k3' if ref is None else 'k3'}"
        tag += "" if told is None else ", truncated weights"
        given_to_both = policy, old, ref, told, advantages
        mine = partial(our_grpo, *given_to_both, aggregate, clip)
        theirs = partial(trl_grpo, *given_to_both, name, clip)
        good.append(compare(tag, mine, theirs, policy))
    rewards = torch.rand(8)
    ours = torch.tensor(losses.group_advantages(rewards.tolist()))
    theirs = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    print(
        f"advantages differ by the factor {float((ours / theirs).mean()):.4f}: TRL divides by n - 1"
    )
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
