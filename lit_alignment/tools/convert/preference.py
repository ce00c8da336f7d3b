"""train_dpo, train_kto and train_ddpo: preference optimisation."""

from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert import reward
from lit_alignment.tools.convert.settings import Extras, Row, Settings, Table, carry
from lit_alignment.tools.convert.trainer import section

LABELS = "the tokens of a response always have labels"
NO_SYNC = "without a model of its own the reference was the base, which stays as it is"
SYNC = """under ZeRO 3 the reference followed twice a step there, once by shards of no meaning; here it follows once, \
under DDP and FSDP2 alone, and checkpoints hold it"""
SYNC_OFF = "sync_ref_model is off"
SFT_MODEL = "it was for metrics only; accuracy, margin and kl are those against the reference"
CACHED = """a second model stood beside the policy there; here its log-probabilities are computed once, before \
training, and frozen_copy holds it as there"""
UNUSED_REFERENCE = "{names}: nothing is compared with a reference"
NO_ADAPTERS = """false stopped the run there, as without adapters the loss had no reference; here model.reference is \
auto"""
SUMS = "{name} compares sums over tokens; sigmoid_norm, ipo and simpo compare means"
NEEDS_MEANS = "false stopped the run there, as {kind} compares means; here it does so by itself"
DROPOUT = """dropout was on in the policy there, which put noise on what was compared; here it is off in policy and \
reference"""
METRICS = "means of a validation were those of the main process there; here they are over all pairs, on all ranks"
PADDED = """labels were padded on the right there, also where the tokenizer pads on the left, so that other tokens \
counted; here those of the response do"""
NO_MARGINS = """margins of the records (precomputed_margin) never arrived there, which stopped the run; here they are \
read, and a record without one is an error"""
LIKELIHOOD = """the chosen response's likelihood was summed over its tokens there, so that long ones counted more; \
here it is their mean"""
SLIC_MARGIN = """margins of the records never arrived there, and outside of the max they would have had no gradient; \
set nll_weight of slic for the chosen response's likelihood"""
PAIRED_Z = """the KL estimates were those of a micro-batch there, with a gradient through them; here they are over the \
whole optimizer step, without one"""
ODDS_BETA = """beta also multiplied the log-odds there, by 0.1 in trainer_settings without it; here they are those of \
the paper. In the oldest versions it was their only weight: set odds_weight to it"""
NO_SMOOTHING = "sigmoid_norm has no label smoothing"
KTO_Z = """the KL estimate was that of a micro-batch there, over responses shuffled once, among them some to the same \
prompt; here it is over the whole optimizer step, with responses to other prompts"""
KTO_CONTEXT = "earlier messages of the bot counted as a part of the response there; here the response alone does"
KTO_SUMS = "it had no effect there: sums over tokens are compared"
SHUFFLED = "data.seed matches prompts with other responses"
REWARD_MODEL = """the reward model was asked in each step there; here each record has its margin (or \
precomputed_margin), the score of answer_w less that of answer_l. predict with a RewardModule gives the scores, \
lit-alignment sample --form pairs the records"""
OVERFLOW = "rewards were exponentiated as they were there, and large ones overflowed; here none does"

MEAN = "The loss is a mean over all {of} of a step, whatever micro-batch they stand in."
REMARKS, KTO_REMARKS = (MEAN.format(of="pairs"), reward.SHARED), (MEAN.format(of="responses"),)

# For each old loss its settings besides beta, with their defaults.
LOSSES: dict[str, Table] = {
    **{key: {} for key in ("sigmoid_with_margin", "ipo", "kto", "apo_zero", "apo_down", "nca_pair", "cal_dpo")},
    "sigmoid": {"label_smoothing": Row(0.0)},
    "hinge": {"norm": Row(True)},
    "slic_hf": {"delta": Row(1.0), "norm": Row(False), "lam": SLIC_MARGIN},
    "cpo": {"norm": Row(True)},
    "simpo": {"gamma": Row(0.1)},
    **{key: {"lambda_": Row(1.0), "ce_coef": Row(1.0)} for key in ("orpo", "asft")},
    "dpop": {"lam": Row(0.1)},
}
NAMES = {"sigmoid_with_margin": "sigmoid_margin", "kto": "kto_pair"}
# What training_arguments left to the losses themselves, whose defaults were others.
NEWER: dict[str, dict[str, Any]] = {"hinge": {"norm": False}}
NEWER |= {name: {"beta": 1.0} for name in ("slic_hf", "orpo", "asft")}
OF_MEANS = ("simpo", "orpo", "asft")  # always
MAYBE_OF_MEANS = ("sigmoid", "ipo", "cpo")
DIVISORS = ("beta", "delta", "ce_coef")
KTO: Table = {"beta": Row(0.1), "desirable_weight": Row(1.33), "undesirable_weight": Row(1.0)}
DDPO: Table = {"beta": Row(0.1), "forward_kl": Row(False)}


def pairs(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of train_dpo: a loss of pairs."""
    old = section(top)
    given = old.part("loss_settings")
    kind = given.take("loss_type", "sigmoid")
    if kind not in LOSSES:
        raise ConfigError(f"{given.path_of('loss_type')} is '{kind}'; turbo-alignment has {', '.join(sorted(LOSSES))}.")
    given.defaults |= NEWER.get(kind, {}) if "training_arguments" in top else {}
    means = old.take("average_log_prob", False)
    losses = _losses(kind, carry(given, {"beta": Row(0.1), **LOSSES[kind]}), means, given)
    old.warn(NEEDS_MEANS.format(kind=kind), "average_log_prob", when=kind in OF_MEANS and not means)
    sums = kind not in (*OF_MEANS, *MAYBE_OF_MEANS)
    old.leave_out(SUMS.format(name=losses[0]["name"]), "average_log_prob", when=means and sums)
    given.warn(NO_MARGINS, "loss_type", "data.train", when=kind == "sigmoid_with_margin")
    given.warn(LIKELIHOOD, "loss_type", "model.losses", when=kind == "cpo" and not means)
    given.warn(PAIRED_Z, "loss_type", "model.losses", when=kind == "kto")
    given.warn(ODDS_BETA, "beta", "model.losses", when=kind in ("orpo", "asft") and given.take("beta", 0.1) != 1)
    smoothed = kind == "sigmoid" and given.take("label_smoothing", 0.0) > 0
    given.leave_out(NO_SMOOTHING, "label_smoothing", when=means and smoothed)
    old.leave_out(SFT_MODEL, "use_sft_model", when=old.take("use_sft_model", False))
    top.warn(PADDED, "tokenizer_settings")
    return _compared(top, old, losses, "preferences")


def _losses(kind: str, old: dict[str, Any], means: bool, given: Settings) -> list[dict[str, Any]]:
    """Our losses for an old one with its settings; `means` says that it compared means over tokens."""
    for key in DIVISORS:
        if old.get(key, 1.0) <= 0:
            raise ConfigError(f"{given.path_of(key)} is {old[key]}: the loss can be converted where it is above 0.")
    beta, norm = old["beta"], old.get("norm", True)
    match kind:
        case "sigmoid" if means:
            return [{"name": "sigmoid_norm", "beta": beta}]
        case "sigmoid":
            return [{"name": kind, **old}]
        case "ipo":
            return [{"name": "ipo" if means else "ipo_sum", "beta": beta}]
        case "hinge":
            return [{"name": "hinge" if norm else "hinge_reference_free", "beta": beta}]
        case "slic_hf" if norm:  # max(0, delta - x) is delta max(0, 1 - x / delta)
            return [{"name": "hinge", "weight": old["delta"], "beta": _exact(beta / old["delta"])}]
        case "slic_hf":  # max(0, delta - beta x) is beta max(0, delta / beta - x)
            margin = _exact(old["delta"] / beta)
            return [{"name": "slic", "weight": beta, "target_margin": margin, "nll_weight": 0.0}]
        case "cpo" if means and norm:
            return [{"name": "sigmoid_norm", "beta": beta}, {"name": "sft"}]
        case "cpo" if means:
            return [{"name": "simpo", "beta": beta, "target_margin": 0.0, "nll_weight": 1.0}]
        case "cpo":
            return [{"name": "rpo" if norm else "cpo", "beta": beta, "nll_weight": 1.0}]
        case "orpo" | "asft":
            return [{"name": kind, "weight": old["ce_coef"], "odds_weight": _exact(old["lambda_"] / old["ce_coef"])}]
        case "simpo":
            return [{"name": kind, "beta": beta, "target_margin": _exact(beta * old["gamma"])}]
        case "dpop":
            return [{"name": kind, "beta": beta, "penalty": old["lam"]}]
        case _:
            return [{"name": NAMES.get(kind, kind), "beta": beta}]


def _exact(value: float) -> float:
    """A product or quotient without the digits that binary fractions add."""
    return float(f"{value:.12g}")


def responses(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of train_kto: responses judged alone."""
    old = section(top)
    for name in ("train_dataset_settings", "val_dataset_settings"):
        top.part(name).leave_out(SHUFFLED, "shuffle_seed")
        top.warn(KTO_CONTEXT, name)
    old.leave_out(KTO_SUMS, "average_log_prob", when=old.take("average_log_prob", False))
    top.warn(KTO_Z, "train_kto", "model.losses")
    return _compared(top, old, [{"name": "kto", **carry(old, KTO)}], "outcomes")


def distilled(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of train_ddpo: pairs with the margins of a reward model."""
    old, loss = section(top), {"name": "ddpo"}
    for key, row in DDPO.items():  # beside the trainer's settings, or among them
        loss |= carry(top if key in top else old, {key: row})
    top.leave_out(REWARD_MODEL, "rm_settings", "rm_tokenizer_settings")
    for name in ("train_dataset_settings", "val_dataset_settings"):
        top.part(name).leave_out(REWARD_MODEL, "pair_preferences")
    old.leave_out(SUMS.format(name="ddpo"), "average_log_prob", when=old.take("average_log_prob", False))
    top.warn(OVERFLOW, "rm_settings")
    return _compared(top, top if "use_ref_model" in top else old, [loss], "preferences")


def _compared(top: Settings, old: Settings, losses: list[dict[str, Any]], kind: str) -> Extras:
    """Our losses and their reference, about which `old` speaks, and what the records hold."""
    from lit_alignment.losses.preference_config import LossConfig

    for name in ("train_dataset_settings", "val_dataset_settings"):
        top.part(name).leave_out(LABELS, "add_labels")
        top.warn(reward.WINDOWS, name, when=kind == "preferences")
    top.warn(DROPOUT, "model_settings")
    top.warn(METRICS, "metrics")
    module: dict[str, Any] = {"losses": losses}
    model, second = top.part("model_settings"), old.take("use_ref_model", True)
    continued = model.raw("adapter_path") is not None
    compares = any(LossConfig(**loss).form.needs_reference for loss in losses)
    sync = section(top).part("sync_ref_settings")
    synced, unused = sync.take("sync_ref_model", False), UNUSED_REFERENCE.format(names=losses[0]["name"])
    follows = synced and second and compares
    if follows:
        module["reference_sync"] = {"every_n_steps": sync.take("sync_steps", 1), "mix": sync.take("alpha", 1.0)}
        sync.warn(SYNC, "sync_ref_model", "model.reference_sync")
    else:
        why = (NO_SYNC if compares else unused) if synced else SYNC_OFF
        sync.leave_out(why, "sync_ref_model", when=synced)
        sync.leave_out(why, "alpha", "sync_steps")
    if not compares:
        old.leave_out(unused, "use_ref_model", when=second)
    elif not second and continued:
        module["reference"] = "adapter_off"
    elif not (follows or continued or "peft_settings" in model or (second and losses[0]["name"] == "kto")):
        old.warn(CACHED if second else NO_ADAPTERS, "use_ref_model", "model.reference")
    return module, {"kind": kind}
