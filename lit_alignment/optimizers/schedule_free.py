"""AdamW without a schedule: a running average of the weights takes the place of a falling learning rate."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lit_alignment.optimizers.groups import evaluated


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW whose gradients are taken between its iterates z and their average x, at y = (1 - beta1) z + beta1 x.

    x <- (1 - c) x + c z, where c is the step's share of the sum of all squared learning rates. The parameters are y and
    z is kept; x follows from both without being kept, so looking at it changes nothing, which in place would round.

    Args:
        params: Groups of parameters.
        lr: Learning rate; warm-up may raise it, nothing need lower it.
        weight_decay: Decay, taken at y.
        betas: How near gradients are taken to the average, and averaging factor of the squared gradients.
        eps: Added to the denominator.

    Source: Defazio et al. 2024 (arXiv:2405.15682); as `schedulefree.AdamWScheduleFree` has it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Nothing has been averaged."""
        if not (0 < betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas are {[*betas]}; the first is above 0, and both are below 1.")
        if eps <= 0:
            raise ValueError(f"eps is {eps}; use a number above 0.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each parameter that has a gradient; what the closure returns comes back."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, y: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rate, (beta1, beta2) = self.state[y], group["lr"], group["betas"]
        if not state:
            state |= {"z": y.detach().clone(), "exp_avg_sq": torch.zeros_like(y)}
            state |= {"step": 0, "highest": 0.0, "weight_sum": 0.0}
        z, square = state["z"], state["exp_avg_sq"]
        state["step"] += 1
        state["highest"] = max(state["highest"], rate)
        state["weight_sum"] += state["highest"] ** 2
        share = state["highest"] ** 2 / state["weight_sum"] if state["weight_sum"] else 0.0
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        direction = gradient.div(denominator).add_(y, alpha=group["weight_decay"])
        y.lerp_(z, share).add_(direction, alpha=rate * (beta1 * (1 - share) - 1))
        z.sub_(direction, alpha=rate)

    @torch.no_grad()
    def averages(self) -> dict[Tensor, Tensor]:
        """The average x of each parameter that has been updated."""
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            weight = 1 - 1 / group["betas"][0]
            known = (parameter for parameter in group["params"] if self.state.get(parameter))
            found |= {y: y.detach().lerp(self.state[y]["z"], weight) for y in known}
        return found
