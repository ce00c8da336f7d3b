"""Settings of the divergence of distillation."""

import math
from dataclasses import dataclass

from lit_alignment.errors import ConfigError


@dataclass(frozen=True)
class DistillationConfig:
    """The divergence of the student's next-token distributions from the teacher's.

    Args:
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), and what lies between them the generalized
            Jensen-Shannon divergence, of which 0.5 is the ordinary one.
        temperature: Divides the logits of both; the divergence is not multiplied by its square.
    """

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what the divergence is not defined for."""
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"model.divergence.beta is {self.beta}; use 0 to 1.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"model.divergence.temperature is {self.temperature}; use more than 0.")
