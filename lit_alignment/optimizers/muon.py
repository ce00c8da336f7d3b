"""Muon for hidden matrices and AdamW for all other weights, as one optimizer.

R rows, C columns
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from lit_alignment.optimizers.groups import evaluated

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; all singular values end between 0.7 and 1.2


def orthogonalized(matrix: Tensor, num_steps: int) -> Tensor:
    """About U V^T of a matrix U S V^T: all singular values near 1; [R, C], in bfloat16.

    Args:
        matrix: Any matrix, [R, C].
        num_steps: Newton-Schulz iterations.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), as `torch.optim.Muon` has it.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.bfloat16().T if matrix.shape[0] > matrix.shape[1] else matrix.bfloat16()
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(num_steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices of the decoder layers, AdamW for embeddings, heads, norms, biases and all others.

    Hidden matrices are the groups with `hidden: True`. Muon's update is scaled by 0.2 sqrt(max(R, C)), to the usual
    root mean square of AdamW's, so that one learning rate and one weight decay serve both. The factors A and B of LoRA
    are for AdamW: Muon is steepest descent in the spectral norm of a matrix that acts by itself, and these act as a
    product. Of weights in shards each rank gathers the momentum of one matrix at a time, and updates its own rows.

    Args:
        params: Groups of parameters.
        lr: Highest learning rate.
        weight_decay: Decoupled decay.
        momentum: Averaging factor of Muon's gradients.
        nesterov: Whether Muon's update looks one step ahead.
        ns_steps: Newton-Schulz iterations.
        betas: Averaging factors of AdamW's two moments.
        eps: Added to AdamW's denominator.

    Raises:
        ValueError: If a hidden weight is no matrix.

    Source: Jordan et al. 2024; scale: Liu et al. 2025 (arXiv:2502.16982).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Nothing has been averaged."""
        if not 0 <= momentum < 1 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"momentum is {momentum} and betas are {[*betas]}; use numbers from 0 up to, but not, 1.")
        if ns_steps < 1 or eps <= 0:
            raise ValueError(f"ns_steps is {ns_steps} and eps is {eps}; use numbers above 0.")
        of_muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "hidden": False}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, **of_muon})
        for group in self.param_groups:
            for parameter in group["params"] if group["hidden"] else []:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, and a hidden weight has shape {list(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient; what the closure returns comes back."""
        loss = evaluated(closure)
        for group in self.param_groups:
            gradients = {each: each.grad for each in group["params"] if each.grad is not None}
            if group["hidden"]:
                for parameter, gradient in gradients.items():
                    self._update_matrix(parameter, gradient, group)
            else:
                self._update_others(gradients, group)
        return loss

    def _update_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        scale = 0.2 * math.sqrt(max(parameter.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(_of_whole(update, group["ns_steps"]), alpha=-group["lr"] * scale)

    def _update_others(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in gradients]
        for parameter, state in zip(gradients, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        adamw(
            list(gradients),
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _of_whole(update: Tensor, num_steps: int) -> Tensor:
    """A momentum orthogonalized as a whole matrix; of a sharded one this rank's shard of that."""
    if not isinstance(update, DTensor):
        return orthogonalized(update, num_steps).to(update.dtype)
    mesh, whole = update.device_mesh, orthogonalized(update.full_tensor(), num_steps).to(update.dtype)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, update.placements)
