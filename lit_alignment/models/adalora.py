"""What peft leaves to the training loop of AdaLoRA: ranks that fall, and an orthogonality that is kept.

Source: Zhang et al. 2023 (arXiv:2303.10512).
"""

from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn

from lit_alignment.errors import ConfigError

MOMENTS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of each weight's importance, as peft names them


class RankSchedule:
    """Lets the ranks of an AdaLoRA model fall as its configuration says.

    Args:
        network: The model.
    """

    def __init__(self, network: PeftModel) -> None:
        """Find the parts that take part."""
        self.model: Any = network.base_model
        self.config: Any = network.active_peft_config

    @classmethod
    def of(cls, network: nn.Module | None) -> "RankSchedule | None":
        """The schedule of a model, or None if it has none."""
        found = isinstance(network, PeftModel) and isinstance(network.active_peft_config, AdaLoraConfig)
        return cls(network) if found and isinstance(network, PeftModel) else None

    def check(self, total_steps: float) -> None:
        """Refuse a schedule that does not end with the run.

        Raises:
            ConfigError: Saying what it has to be.
        """
        if self.config.total_step != total_steps:
            raise ConfigError(
                f"model.peft.total_step is {self.config.total_step}, and the run has {total_steps:g} optimizer steps. "
                f"Set it to {total_steps:g}; tinit and tfinal are counted in these."
            )

    def step(self, number: int) -> None:
        """Measure the weights' importance, and leave out what is over the budget; between a step and its end.

        Args:
            number: Of the optimizer step, from 0.
        """
        self.model.update_and_allocate(number)

    def penalty(self) -> Tensor:
        """How far the factors are from orthogonal, weighted; scalar."""
        norms = []
        for name, factor in self.model.model.named_parameters():
            if factor.requires_grad and ("lora_A" in name or "lora_B" in name):
                square = factor @ factor.T if "lora_A" in name else factor.T @ factor
                norms.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device)))
        return float(self.config.orth_reg_weight) * torch.stack(norms).mean()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        allocator = self.model.rankallocator
        moments = {name: dict(getattr(allocator, name)) for name in MOMENTS}
        return {**moments, "rank_pattern": self.config.rank_pattern or {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        devices = {name: parameter.device for name, parameter in self.model.model.named_parameters()}
        for name in MOMENTS:
            moved = {key: value.to(devices.get(key, value.device)) for key, value in state[name].items()}
            setattr(self.model.rankallocator, name, moved)
        self.config.rank_pattern = state["rank_pattern"] or None
