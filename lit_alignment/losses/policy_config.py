"""Losses of policy optimisation: four independent choices, the papers' names for them, and their settings."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from lit_alignment.errors import ConfigError

PolicyLossName = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "luspo", "rloo"]
Objective = Literal["clip", "cispo", "sapo"]
RatioLevel = Literal["token", "sequence"]
Aggregate = Literal["sequence_mean", "token_mean", "max_length", "sequence_sum"]
AdvantageForm = Literal["group", "batch", "none", "leave_one_out"]
Correction = Literal["token_truncate", "sequence_mask"]


@dataclass(frozen=True)
class PolicyForm:
    """What a loss consists of.

    Args:
        objective: What is minimised for each token: the clipped ratio times the advantage (`clip`), the log-probability
            times both with a capped ratio that has no gradient (`cispo`), or a sigmoid of the ratio (`sapo`).
        ratio: Policy to old policy of each token, or the geometric mean of these over the response.
        aggregate: Mean over responses of the mean over tokens, mean over tokens, sum over tokens divided by what the
            responses could have had, or mean over responses of the sum over tokens.
        advantage: Reward less the mean of its group, divided by the deviation of the group (`group`) or of the
            optimizer step (`batch`) or not at all (`none`); or less the mean of the others (`leave_one_out`).
        usual: Its own values of settings, before those of the objective.
    """

    objective: Objective = "clip"
    ratio: RatioLevel = "token"
    aggregate: Aggregate = "sequence_mean"
    advantage: AdvantageForm = "group"
    usual: dict[str, float] = field(default_factory=dict)


PRESETS: dict[PolicyLossName, PolicyForm] = {
    "grpo": PolicyForm(),
    "dr_grpo": PolicyForm(aggregate="max_length", advantage="none"),
    "dapo": PolicyForm(aggregate="token_mean", usual={"epsilon_high": 0.28}),
    "bnpo": PolicyForm(aggregate="token_mean"),
    # Ratios of sequences move far less than those of tokens: these are the papers' values.
    "gspo": PolicyForm(ratio="sequence", usual={"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "cispo": PolicyForm("cispo", aggregate="token_mean"),
    "sapo": PolicyForm("sapo"),
    "luspo": PolicyForm(
        ratio="sequence", aggregate="sequence_sum", usual={"epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
    ),
    "rloo": PolicyForm(aggregate="token_mean", advantage="leave_one_out"),
}
# The settings that each objective reads, with their usual values; without a delta no ratio is capped.
READS: dict[Objective, dict[str, float]] = {
    "clip": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": math.inf},
    "cispo": {"epsilon_high": 5.0},
    "sapo": {"tau": 1.0, "tau_negative": 1.05},
}
CHOICES: dict[str, tuple[str, ...]] = {
    "name": get_args(PolicyLossName),
    "objective": get_args(Objective),
    "ratio": get_args(RatioLevel),
    "aggregate": get_args(Aggregate),
    "advantage": get_args(AdvantageForm),
    "correction": get_args(Correction),
}
CORRECTION_CAP = 3.0
NOT_NEGATIVE = ("epsilon_low", "epsilon_high", "kl_weight")
POSITIVE = ("delta", "tau", "tau_negative", "correction_cap")


@dataclass(frozen=True)
class PolicyLossConfig:
    """The loss of policy optimisation. What is None is as the name says, or takes its usual value.

    Args:
        name: Which choices are made below; `configs/policy/README.md` has the table.
        objective: What is minimised for each token.
        ratio: Whether tokens or whole responses are compared with the policy that sampled them.
        aggregate: How the tokens' losses become one.
        advantage: How rewards become advantages.
        epsilon_low: How far below 1 the ratio is clipped (clip).
        epsilon_high: How far above 1 it is clipped in clip; in cispo the cap itself.
        delta: Cap of the ratio itself, since clipping leaves it without bound where the advantage is negative (clip).
        tau: Temperature of the sigmoid where the advantage is positive (sapo).
        tau_negative: The same elsewhere.
        kl_weight: Of the k3 estimate of the KL divergence from the reference; 0 needs no reference.
        kl_bias_correction: Multiply that by the ratio, so that its gradient is the divergence's own.
        correction: For a sampler whose log-probabilities differ from the trainer's: weigh each token by old to sampler
            up to a cap (`token_truncate`), or each response by its product, and by 0 above the cap (`sequence_mask`).
        correction_cap: That cap; 3 unless set.
        mask_truncated: Leave responses that reached the limit of tokens out of the loss; their rewards still count.
    """

    name: PolicyLossName = "grpo"
    objective: Objective | None = None
    ratio: RatioLevel | None = None
    aggregate: Aggregate | None = None
    advantage: AdvantageForm | None = None
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    tau: float | None = None
    tau_negative: float | None = None
    kl_weight: float = 0.0
    kl_bias_correction: bool | None = None
    correction: Correction | None = None
    correction_cap: float | None = None
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        """Refuse settings without effect, and values that the loss is not defined for."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name != "name"):
                raise ConfigError(f"model.loss: {name} is {value!r}; choose {', '.join(choices)}.")
        reads = READS[self.form.objective]
        for name in sorted({each for settings in READS.values() for each in settings} - set(reads)):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"model.loss: {self.form.objective} has no {name}; it reads {', '.join(reads)}. Remove {name}."
                )
        if self.kl_bias_correction is not None and not self.kl_weight:
            raise ConfigError("model.loss: kl_bias_correction has no effect while kl_weight is 0. Remove it.")
        if self.correction_cap is not None and self.correction is None:
            raise ConfigError("model.loss: correction_cap has no effect without correction. Remove it.")
        for name in (*NOT_NEGATIVE, *POSITIVE):
            value = getattr(self, name)
            zero = name in NOT_NEGATIVE and (name, self.form.objective) != ("epsilon_high", "cispo")
            if value is not None and not (0 < value < math.inf or (value == 0 and zero)):
                raise ConfigError(f"model.loss: {name} is {value}; use {'0 or more' if zero else 'more than 0'}.")
        if self.epsilon_low is not None and self.epsilon_low > 1:
            raise ConfigError(f"model.loss: epsilon_low is {self.epsilon_low}; no ratio is below 0, so use at most 1.")

    @property
    def form(self) -> PolicyForm:
        """The choices of the name, with those that are set in their place."""
        preset = PRESETS[self.name]
        form = replace(
            preset,
            objective=self.objective or preset.objective,
            ratio=self.ratio or preset.ratio,
            aggregate=self.aggregate or preset.aggregate,
            advantage=self.advantage or preset.advantage,
        )
        # A name's own values belong to its ratio and objective.
        same = (form.objective, form.ratio) == (preset.objective, preset.ratio)
        return form if same else replace(form, usual={})

    def setting(self, name: str) -> float:
        """The value of a setting that the objective reads, or its usual one."""
        given: float | None = getattr(self, name)
        return {**READS[self.form.objective], **self.form.usual}[name] if given is None else given

    @property
    def cap(self) -> float:
        """Cap of the correction."""
        return CORRECTION_CAP if self.correction_cap is None else self.correction_cap

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""
        return self.kl_weight > 0
