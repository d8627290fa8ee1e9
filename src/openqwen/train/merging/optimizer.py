"""The Online Merging Optimizer (Lu et al. 2024, arXiv 2405.17931).

Each step of AdamW is merged with the task vector of the model that training started from.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openqwen.support.errors import OpenQwenError
from openqwen.train.merging import kernels
from openqwen.train.merging.largest import LargestSteps, PendingStep
from openqwen.train.merging.masks import LocalElements, limit, random_mask, stream
from openqwen.train.merging.plain import (
    Form,
    Signs,
    StepNumbers,
    adamw_step,
    add,
    merged,
    update_moments,
)
from openqwen.train.merging.select import sum_over_parts, top_mask
from openqwen.train.merging.task_vector import MergedParameter, TaskVector
from openqwen.train.parallel import local_shard

_CLIP = 1.0  # the released code's bound of a scaled task vector's entries
SPARSE = 0.25  # up to this share, the task vector's entries are stored with their places


class OnlineMerging(torch.optim.AdamW):
    """AdamW whose steps are merged with the task vector: OnDARE and OnTIES.

    Alignment costs skills that the model had ("alignment tax"). Merging models after training gives
    some of them back; here a small merge is part of every step. θ_b are the weights of the base
    model, θ_r those of the reference, which training starts from. Their difference is the task
    vector τ = θ_r − θ_b. With the moments m and v of the gradient g, step t is

        m ← β₁ m + (1 − β₁) g,    v ← β₂ v + (1 − β₂) g²                      AdamW's moments
        d = −lr · m̂ / (√v̂ + ε),   m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)      AdamW's step
        θ ← (1 − lr · weight_decay) θ + (1 − α) F(d) ⊕ α F(τ)                 the merge

    F keeps the share p (`reserve`) of a tensor's entries and sets the others to 0.

    form="dare": F keeps each entry with probability p, and a ⊕ b = a + b. There are two scalings:

        "inverse"   Kept entries are divided by p, so the mean step is AdamW's. d has a new mask in
                    each step. τ has one mask for the whole run, and F(τ) is clamped to ±1. This is
                    the released code. The paper's α and p (1e-6 … 5e-6; 5e-4 … 1e-2) fit it, with
                    the learning rate that AdamW would have.
        "none"      The paper's equations: kept entries stay as they are, and d and τ have new masks
                    in each step. The mean step is p times AdamW's, so the learning rate must be up
                    to 1/p times as large, and so must α.

    form="ties": F keeps the k = max(1, ⌊p n⌋) entries of the largest magnitude of a tensor of n, as
    they are; among equal ones those with the smallest index. `scaling` changes nothing. The signs
    of the kept entries a of the step and b of τ are elected in one of two ways:

        "weighted"    The paper's: (1 − α) a + α b where the signs agree, else the one of the two
                      with the larger magnitude, and 0 if they are equal. The step mostly wins.
        "unweighted"  The released code's: the sign of a + b wins (0 is positive), entries of the
                      other sign are dropped, the rest is added with its weights. τ is far larger
                      than a step, so it decides most signs where it is kept: the step goes on only
                      where it follows τ, which makes the mean step smaller.

    every=K: K − 1 steps are AdamW's, and their sum Δ is kept. Each K-th step takes Δ back and
    merges d + Δ with τ.

    α τ is smaller than a float32 weight's rounding: at α = 1e-7 most of it would be lost. So a
    changed entry keeps what rounding lost, and adds it next time ("lost" in the state). α = 0 with
    p = 1 calls AdamW itself and gives its bits.

    Masks depend on the generator's seed, the parameter's name, its step and the element's index in
    the whole tensor. So a run repeats, needs nothing but AdamW's state and "lost" to be resumed,
    and gives the same weights for sharded parameters (DTensor) on any number of ranks. Every rank
    must call `step`.

    Sources: the paper for the equations, QwenLM/online_merging_optimizers for what it leaves open.

    Args:
        parameters: Tensors, (name, tensor) pairs, or groups of these. Without names, a parameter's
            position keys its masks. They must be contiguous.
        reference: θ_r, a tensor for each parameter in order: whole, or sharded as the parameter is.
            It may be read lazily, one at a time.
        base: θ_b, in the same way.
        form: "dare" or "ties".
        alpha: α, the weight of the task vector, from 0 to 1.
        reserve: p, above 0, at most 1.
        every: K, at least 1.
        scaling: of OnDARE, "inverse" or "none".
        signs: of OnTIES, "weighted" or "unweighted".
        lr: Learning rate.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: Decoupled decay, as in AdamW.
        generator: Its seed is the masks'; None: 0. Nothing is drawn from it.
        store: Of the task vector in memory, float32 or bfloat16.
        folder: Keep a task vector that is not sparse in a temporary file here, not in memory.

    Raises:
        OpenQwenError: A setting is out of range, or the tensors differ in shape or are not finite.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        reference: Iterable[Tensor],
        base: Iterable[Tensor],
        form: Form = "dare",
        alpha: float = 1e-6,
        reserve: float = 0.01,
        every: int = 1,
        scaling: Literal["inverse", "none"] = "inverse",
        signs: Signs = "weighted",
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
        store: torch.dtype = torch.float32,
        folder: Path | None = None,
    ):
        _check(form, alpha, reserve, every, scaling, signs)
        super().__init__(
            parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self.form, self.alpha, self.reserve, self.every = form, alpha, reserve, every
        self.signs = signs
        self._inverse = form == "dare" and scaling == "inverse"
        # The paper's form draws the task vector's mask anew in each step.
        self._fresh = form == "dare" and scaling == "none" and reserve < 1
        self._seed = 0 if generator is None else generator.initial_seed()
        self._store, self._folder = store, folder
        self._parts: dict[Tensor, MergedParameter] = {}
        self._largest = LargestSteps()
        ours, theirs = iter(reference), iter(base)
        for name, parameter in self._named():
            one, other = next(ours, None), next(theirs, None)
            if one is None or other is None:
                raise OpenQwenError(
                    f"The {'reference' if one is None else 'base'} has no tensor for '{name}'.",
                    do="give a tensor for each parameter, in the same order",
                )
            self._parts[parameter] = self._part(name, parameter, one, other)

    @property
    def is_adamw(self) -> bool:
        """Whether nothing is merged and nothing dropped, so that each step is AdamW's own."""
        return self.alpha == 0 and self.reserve == 1

    @property
    def has_no_task(self) -> bool:
        """Whether reference and base are equal in all that this rank holds."""
        values = [part.task.values for part in self._parts.values()]
        return not any(task is not None and bool(task.any()) for task in values)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; every rank must call it. Returns what the closure returns.

        Raises:
            OpenQwenError: A parameter is not contiguous.
        """
        if self.is_adamw:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = getattr(self, "found_inf", None)  # from a gradient scaler: this step is left out
        if found is None or not found.item():
            self._step()
        return loss

    def _step(self) -> None:
        all_kept, largest = list[PendingStep](), list[PendingStep]()
        for group in self.param_groups:
            numbers: dict[int, StepNumbers] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                run, gradient = self._prepared(parameter, group, numbers)
                if kernels.usable(gradient, *run.local.values()):
                    pending = PendingStep(
                        run.call(gradient), run.part, float(group["lr"]), gradient
                    )
                    (largest if run.selects else all_kept).append(pending)
                else:
                    run.plain(gradient)
        if all_kept:
            kernels.steps([pending.call for pending in all_kept])
        if largest:
            self._largest.run(largest)

    def _named(self) -> list[tuple[str, Tensor]]:
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            names = group.get("param_names") or range(len(named), len(named) + len(group["params"]))
            named += zip(map(str, names), group["params"])
        return named

    @torch.no_grad()
    def _part(
        self, name: str, parameter: Tensor, reference: Tensor, base: Tensor
    ) -> MergedParameter:
        """The fixed data of a parameter, with F(τ), or τ where its mask is drawn in each step."""
        total = parameter.numel()
        largest = max(1, int(self.reserve * total))
        elements, reduce = LocalElements.of(parameter), sum_over_parts(parameter)
        of_task = partial(MergedParameter, name, elements, reduce, total, largest)
        if self.is_adamw or (self.alpha == 0 and (self.form, self.signs) != ("ties", "unweighted")):
            return of_task(TaskVector())
        tau = _local_of(reference, parameter, name, "reference")
        tau = tau - _local_of(base, parameter, name, "base")
        if not torch.isfinite(tau).all():
            raise OpenQwenError(
                f"The task vector of '{name}' is not finite.",
                where=name,
                do="look for NaN and infinite weights in the reference and in the base",
            )
        kept = None
        if self.reserve < 1 and self.form == "ties":
            kept = top_mask(tau, largest, elements, reduce)
        elif self.reserve < 1 and not self._fresh:
            key = stream(self._seed, name, "task")
            kept = random_mask(key, self.reserve, elements, tau.device)
        if self._inverse:
            tau = (tau / self.reserve).clamp_(-_CLIP, _CLIP)
        store = torch.float64 if tau.dtype == torch.float64 else self._store
        # Decided by p alone, so that all ranks do the same: only stored entries are compensated.
        return of_task(TaskVector.of(tau, kept, self.reserve <= SPARSE, store, self._folder))

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, with what it lacks: all of it, or what AdamW's does not have."""
        state = self.state[parameter]
        if not _local(parameter).is_contiguous():
            raise OpenQwenError(
                f"The parameter '{self._parts[parameter].name}' is not contiguous.",
                do="call .contiguous() on it before the optimizer is made",
            )
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        names = ["exp_avg", "exp_avg_sq"]
        names += ["lost"] if self.every > 1 or self._parts[parameter].task else []
        names += ["cached"] if self.every > 1 else []
        for name in names:
            if name not in state:
                exact = torch.promote_types(parameter.dtype, torch.float32)
                dtype = exact if name in ("lost", "cached") else parameter.dtype
                state[name] = torch.zeros_like(parameter, dtype=dtype).detach()
        return state

    def _prepared(
        self, parameter: Tensor, group: dict[str, Any], known: dict[int, StepNumbers]
    ) -> tuple["_MergedStep", Tensor]:
        """A parameter's next step, and its gradient. known: the numbers of the group's steps."""
        state, part = self._state(parameter), self._parts[parameter]
        state["step"] += 1
        step = int(state["step"].item())
        if step not in known:
            known[step] = self._numbers(group, step)
        local = {name: _local(value) for name, value in state.items() if name != "step"}
        local["weights"] = _local(parameter)
        gradient = _local(cast(Tensor, parameter.grad)).contiguous()
        return _MergedStep(self, part, local, known[step], step), gradient

    def _numbers(self, group: dict[str, Any], step: int) -> StepNumbers:
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        divisor = getattr(self, "grad_scale", None)
        return StepNumbers(
            scale=1.0 if divisor is None else 1.0 / float(divisor),
            keep1=beta1,
            new1=1 - beta1,
            keep2=beta2,
            new2=1 - beta2,
            rate=-rate / (1 - beta1**step),
            root=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
            decay=1 - rate * group["weight_decay"],
            factor=(1 - self.alpha) / (self.reserve if self._inverse else 1.0),
            alpha=self.alpha,
        )


class _MergedStep:
    """One step of one parameter, on this rank's elements.

    local: weights, exp_avg, exp_avg_sq, and where there are any lost and cached.
    """

    def __init__(
        self,
        optimizer: OnlineMerging,
        part: MergedParameter,
        local: dict[str, Tensor],
        numbers: StepNumbers,
        step: int,
    ):
        self.optimizer, self.part, self.local, self.numbers = optimizer, part, local, numbers
        self.merges = step % optimizer.every == 0
        drops = optimizer.reserve < 1 and self.merges
        self.draws = drops and optimizer.form == "dare"
        self.selects = drops and optimizer.form == "ties"
        keys = partial(stream, optimizer._seed, part.name, step)
        self.step_key = keys("step") if self.draws else 0
        self.task_key = keys("task") if optimizer._fresh else 0

    def plain(self, gradient: Tensor) -> None:
        """The step in plain PyTorch."""
        self.local = {name: value.detach().view(-1) for name, value in self.local.items()}
        local, numbers, part, gradient = self.local, self.numbers, self.part, gradient.view(-1)
        weights = local["weights"]
        dtype = torch.promote_types(weights.dtype, torch.float32)
        mean, square = local["exp_avg"].to(dtype), local["exp_avg_sq"].to(dtype)
        update_moments(mean, square, gradient.to(dtype), numbers)
        local["exp_avg"].copy_(mean)
        local["exp_avg_sq"].copy_(square)
        exact = weights.to(dtype)
        if numbers.decay != 1:
            exact = exact * numbers.decay
        step = adamw_step(mean, square, numbers)
        if "cached" in local and self.merges:
            step = step + local["cached"]
        if self.draws:
            share = self.optimizer.reserve
            mask = random_mask(self.step_key, share, part.elements, weights.device)
            step = torch.where(mask, step, 0.0)
        elif self.selects:
            mask = top_mask(step, part.largest, part.elements, part.reduce)
            step = torch.where(mask, step, 0.0)
        weights.copy_(self._changed(exact, step))

    def call(self, gradient: Tensor) -> kernels.MergingCall:
        """The arguments of the same by the compiled kernel, without those of OnTIES."""
        optimizer, local, part = self.optimizer, self.local, self.part
        return kernels.call(
            weights=local["weights"],
            mean=local["exp_avg"],
            square=local["exp_avg_sq"],
            lost=local.get("lost"),
            cached=local.get("cached"),
            gradient=gradient,
            **vars(part.elements),
            task=part.task.values,
            task_lanes=part.task.lanes,
            task_starts=part.task.starts,
            step_key=self.step_key,
            task_key=self.task_key,
            limit=limit(optimizer.reserve if optimizer.form == "dare" else 1.0),
            form=kernels.FORMS[optimizer.form, optimizer.signs],
            fresh=optimizer._fresh,
            merges=self.merges,
            numbers=kernels.packed(self.numbers),
        )

    def _changed(self, weights: Tensor, step: Tensor) -> Tensor:
        """The weights after the step, of which the kept entries are given."""
        optimizer, numbers, dtype = self.optimizer, self.numbers, self.local["weights"].dtype
        lost, cached = self.local.get("lost"), self.local.get("cached")
        if not self.merges:
            assert lost is not None
            assert cached is not None
            cached += step
            total, rest = add(weights, lost, step, dtype)
            lost.copy_(rest)
            return total
        plain = weights + step * numbers.factor
        if lost is None:
            return plain
        task, has = self.part.task.dense(len(lost))
        task = torch.as_tensor(task, device=weights.device).to(weights.dtype)
        if optimizer._fresh and self.part.task:
            elements, share = self.part.elements, optimizer.reserve
            has = random_mask(self.task_key, share, elements, weights.device)
            task = torch.where(has, task, 0.0)
        change = merged(step, task, optimizer.form, optimizer.signs, numbers)
        if cached is not None:
            change, has = change - cached, True
            cached.zero_()
        has = torch.as_tensor(has, device=weights.device)
        total, rest = add(weights, lost, change, dtype)
        lost.copy_(torch.where(has, rest, lost))
        return torch.where(has, total, plain)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_of(given: Tensor, parameter: Tensor, name: str, what: str) -> Tensor:
    """This rank's part of a tensor that is whole, or sharded as the parameter is; flat."""
    if given.shape != parameter.shape:
        raise OpenQwenError(
            f"'{name}' is {list(parameter.shape)}, in the {what} {list(given.shape)}.",
            where=name,
            do="give models of one architecture and vocabulary",
        )
    local = _local(given) if isinstance(given, DTensor) else local_shard(given, parameter)
    exact = torch.promote_types(parameter.dtype, torch.float32)
    return local.detach().to(_local(parameter).device, exact).reshape(-1)


def _check(form: str, alpha: float, reserve: float, every: int, scaling: str, signs: str) -> None:
    rules = [
        ("form", form, form in ("dare", "ties"), "dare or ties"),
        ("alpha", alpha, 0 <= alpha <= 1, "a number from 0 to 1"),
        ("reserve", reserve, 0 < reserve <= 1, "a number above 0, at most 1"),
        ("every", every, every >= 1, "at least 1"),
        ("scaling", scaling, scaling in ("inverse", "none"), "inverse or none"),
        ("signs", signs, signs in ("weighted", "unweighted"), "weighted or unweighted"),
    ]
    for name, value, right, wanted in rules:
        if not right:
            raise OpenQwenError(f"{name} is {value!r}.", where=name, do=f"give {wanted}")
