"""Losses of preference optimisation by name, with their settings, and what each needs."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lit_alignment.errors import ConfigError

LossName = Literal[
    "sigmoid",
    "robust",
    "sigmoid_margin",
    "length_penalty",
    "sigmoid_norm",
    "hinge",
    "hinge_reference_free",
    "slic",
    "ipo",
    "ipo_sum",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "dpop",
    "cal_dpo",
    "discopop",
    "ld_dpo",
    "sft",
    "rpo",
    "mpo",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
    "asft",
    "ddpo",
    "kto_pair",
    "kto",
    "apo_zero_unpaired",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True)
class LossForm:
    """What a loss reads and needs.

    Args:
        reads: Its settings, with their usual values.
        compares: `ratios` to the reference, `logps` without a reference, or `means` of these over tokens.
        of: What it is a loss of.
        margin: Whether it reads the records' margins.
        baseline: Whether it needs the KL estimate z of the whole optimizer step, and over which responses.
    """

    reads: dict[str, Any]
    compares: Literal["ratios", "logps", "means"] = "ratios"
    of: Literal["pairs", "responses"] = "pairs"
    margin: bool = False
    baseline: Literal["mismatched", "other_side"] | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with another model."""
        return self.compares == "ratios"


_BETA: dict[str, Any] = {"beta": 0.1}
_GAP: dict[str, Any] = {**_BETA, "divergence": "reverse_kl", "divergence_alpha": 0.5}
_MEANS: dict[str, Any] = {"nll_weight": 0.0}
_JUDGED: dict[str, Any] = {**_BETA, "desirable_weight": 1.0, "undesirable_weight": 1.0}

FORMS: dict[LossName, LossForm] = {
    "sigmoid": LossForm({**_GAP, "label_smoothing": 0.0}),
    "robust": LossForm({**_GAP, "label_smoothing": 0.1}),
    "sigmoid_margin": LossForm(_GAP, margin=True),
    "length_penalty": LossForm({**_GAP, "length_weight": 0.01}),
    "sigmoid_norm": LossForm({"beta": 5.0}),
    "hinge": LossForm(_GAP),
    "hinge_reference_free": LossForm(_BETA, "logps"),
    "slic": LossForm({"target_margin": 1.0, "nll_weight": 0.1}, "logps"),
    "ipo": LossForm(_BETA),
    "ipo_sum": LossForm(_BETA),
    "exo_pair": LossForm({**_GAP, "label_smoothing": 1e-3}),
    "nca_pair": LossForm(_BETA),
    "bco_pair": LossForm(_BETA),
    "sppo_hard": LossForm(_BETA),
    "apo_zero": LossForm(_BETA),
    "apo_down": LossForm(_BETA),
    "dpop": LossForm({**_BETA, "penalty": 5.0}),
    "cal_dpo": LossForm(_BETA),
    "discopop": LossForm({**_GAP, "tau": 0.05}),
    "ld_dpo": LossForm({**_BETA, "tail_weight": 0.5}),
    "sft": LossForm({}, "logps"),
    "rpo": LossForm({**_GAP, "label_smoothing": 0.0, "nll_weight": 1.0}),
    "mpo": LossForm(_BETA),
    "cpo": LossForm({**_BETA, "label_smoothing": 0.0, "nll_weight": 1.0}, "logps"),
    "simpo": LossForm({**_MEANS, "beta": 2.0, "target_margin": 0.5}, "means"),
    "alphapo": LossForm({**_MEANS, "beta": 2.5, "target_margin": 0.1, "power": 0.25}, "means"),
    "orpo": LossForm({"odds_weight": 0.1}, "means"),
    "asft": LossForm({"odds_weight": 0.1}, "means"),
    "ddpo": LossForm({**_BETA, "forward_kl": False}, margin=True),
    "kto_pair": LossForm(_BETA, baseline="other_side"),
    "kto": LossForm(_JUDGED, of="responses", baseline="mismatched"),
    "apo_zero_unpaired": LossForm(_JUDGED, of="responses"),
}
NOT_NEGATIVE = ("weight", "length_weight", "nll_weight", "tail_weight", "odds_weight", "penalty", "power")
POSITIVE = ("beta", "tau", "desirable_weight", "undesirable_weight")


@dataclass(frozen=True)
class LossConfig:
    """One loss, with its weight among others. A setting that is None takes the loss's usual value.

    Args:
        name: Which one; `configs/preference/README.md` has the table.
        weight: Of its mean over the pairs of an optimizer step.
        beta: Strength of the tie to the reference, or scale of what is compared without one.
        label_smoothing: Share of pairs whose labels are wrong.
        length_weight: What each token that the chosen response is longer takes off (length_penalty).
        nll_weight: Of the chosen response's mean negative log-likelihood; in slic of its summed one.
        tail_weight: Of the tokens of the longer response beyond the shorter one's length (ld_dpo).
        target_margin: How far apart the pair should be, in units of what is compared times beta.
        power: Of alphapo's transformation.
        tau: Temperature of discopop's blend.
        odds_weight: Of the odds in orpo and asft.
        penalty: Weight of a chosen response that is less likely than under the reference (dpop).
        divergence: What ties the policy to the reference.
        divergence_alpha: Exponent of the divergence `alpha`.
        forward_kl: Direction of ddpo: KL(reward model || policy).
        desirable_weight: Weight of good responses judged alone.
        undesirable_weight: Weight of bad ones.
    """

    name: LossName
    weight: float = 1.0
    beta: float | None = None
    label_smoothing: float | None = None
    length_weight: float | None = None
    nll_weight: float | None = None
    tail_weight: float | None = None
    target_margin: float | None = None
    power: float | None = None
    tau: float | None = None
    odds_weight: float | None = None
    penalty: float | None = None
    divergence: Divergence | None = None
    divergence_alpha: float | None = None
    forward_kl: bool | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without effect, and values that the loss is not defined for."""
        if self.name not in FORMS:
            raise ConfigError(f"losses: {self.name!r} is no loss; there are {', '.join(get_args(LossName))}.")
        reads = self.form.reads
        for setting in fields(self)[2:]:
            if getattr(self, setting.name) is not None and setting.name not in reads:
                known = f"it reads {', '.join(reads)}" if reads else "it reads none but weight"
                raise ConfigError(f"losses: {self.name} has no {setting.name}; {known}. Remove {setting.name}.")
        if self.divergence_alpha is not None and self.divergence != "alpha":
            raise ConfigError("losses: divergence_alpha has no effect without divergence: alpha.")
        for name in (*NOT_NEGATIVE, *POSITIVE):
            value = self.weight if name == "weight" else reads.get(name) and self.setting(name)
            if value is not None and not (0 < value < math.inf or (value == 0 and name in NOT_NEGATIVE)):
                above = "0 or more" if name in NOT_NEGATIVE else "more than 0"
                raise ConfigError(f"losses: {self.name}.{name} is {value}; use {above}.")
        smoothing = self.setting("label_smoothing") if "label_smoothing" in reads else 0.0
        if not 0 <= smoothing < 0.5 or (self.name == "exo_pair" and smoothing == 0):
            raise ConfigError(
                f"losses: {self.name}.label_smoothing is {smoothing}; use "
                f"{'more than 0' if self.name == 'exo_pair' else '0 or more'}, and less than 0.5."
            )
        if self.divergence == "alpha" and self.setting("divergence_alpha") == 1:
            raise ConfigError("losses: divergence_alpha is 1; use another value, or divergence: reverse_kl.")

    @property
    def form(self) -> LossForm:
        """What the loss reads and needs."""
        return FORMS[self.name]

    def setting(self, name: str) -> float:
        """The value of a setting that the loss reads, or its usual one."""
        given = getattr(self, name)
        value: float = self.form.reads[name] if given is None else given
        return value
