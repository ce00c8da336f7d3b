"""The losses of preference optimisation: what the old ones are here, and that they have the same values."""

import copy
import json

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

from lit_alignment.errors import ConfigError
from lit_alignment.losses.pairs import Pairs, ResponseLogps, pair_loss
from lit_alignment.losses.preference_config import LossConfig
from lit_alignment.tools.convert import convert, main, preference
from lit_alignment.tools.convert.settings import Notes, Settings
from lit_alignment.trainer_cli import AlignmentCLI, build
from tests.helpers import ROOT

CONFIGS = ROOT / "tests/tools/convert/configs"


def old(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def converted(values, kind="train_dpo"):
    """The arguments of our module and data module, and all notes as one text."""
    top = Settings(copy.deepcopy(values), "", Notes())
    (document,) = convert(top, kind)
    assert not list(top.unread())
    notes = "\n".join(line for lines in top.notes.groups() for line in lines)
    return document.content["model"]["init_args"], document.content["data"]["init_args"], notes


def with_loss(means=False, section="trainer_settings", **loss):
    values = old("dpo")
    values[section] = values.pop("trainer_settings") | {"loss_settings": loss, "average_log_prob": means}
    return values


# Of two pairs: log-probabilities under policy and reference, and lengths.
CHOSEN = ResponseLogps(torch.tensor([-4.0, -9.0]), torch.tensor([-5.0, -7.5]), torch.tensor([4, 6]))
REJECTED = ResponseLogps(torch.tensor([-6.0, -8.0]), torch.tensor([-5.5, -8.5]), torch.tensor([3, 5]))
PAIRS = Pairs(CHOSEN, REJECTED, torch.tensor([0.3, 0.7]), torch.tensor([0.0, 0.0]))


def odds(logp):
    return logp - torch.log1p(-logp.exp())


# The old settings, our losses, and the old loss where it had the same value: of log-probabilities of both responses
# under policy (w, l) and reference (v, k), which are means over tokens where `means` is true.
LOSSES = [
    ({"loss_type": "sigmoid"}, False, [{"name": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - l - v + k))),
    ({"loss_type": "sigmoid", "beta": 0.5, "label_smoothing": 0.2}, False,
     [{"name": "sigmoid", "beta": 0.5, "label_smoothing": 0.2}],
     lambda w, l, v, k: -0.8 * logsigmoid(0.5 * (w - l - v + k)) - 0.2 * logsigmoid(-0.5 * (w - l - v + k))),
    ({"loss_type": "sigmoid", "beta": 5}, True, [{"name": "sigmoid_norm", "beta": 5.0}],
     lambda w, l, v, k: -logsigmoid(5 * (w - l - v + k))),
    ({"loss_type": "sigmoid_with_margin"}, False, [{"name": "sigmoid_margin", "beta": 0.1}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - l - v + k) - PAIRS.margins)),
    ({"loss_type": "hinge"}, False, [{"name": "hinge", "beta": 0.1}],
     lambda w, l, v, k: relu(1 - 0.1 * (w - l - v + k))),
    ({"loss_type": "hinge", "norm": False}, False, [{"name": "hinge_reference_free", "beta": 0.1}],
     lambda w, l, v, k: relu(1 - 0.1 * (w - l))),
    ({"loss_type": "ipo"}, False, [{"name": "ipo_sum", "beta": 0.1}], lambda w, l, v, k: (w - l - v + k - 5) ** 2),
    ({"loss_type": "ipo"}, True, [{"name": "ipo", "beta": 0.1}], lambda w, l, v, k: (w - l - v + k - 5) ** 2),
    ({"loss_type": "kto"}, False, [{"name": "kto_pair", "beta": 0.1}],
     lambda w, l, v, k: ((0.1 * (v - w)).sigmoid() + (0.1 * (l - k)).sigmoid()) / 2),
    ({"loss_type": "slic_hf", "delta": 3}, False,
     [{"name": "slic", "weight": 0.1, "target_margin": 30.0, "nll_weight": 0.0}],
     lambda w, l, v, k: relu(3 - 0.1 * (w - l))),
    ({"loss_type": "slic_hf", "delta": 2, "norm": True, "lam": 0.5}, False,
     [{"name": "hinge", "weight": 2.0, "beta": 0.05}], lambda w, l, v, k: relu(2 - 0.1 * (w - l - v + k))),
    ({"loss_type": "cpo"}, False, [{"name": "rpo", "beta": 0.1, "nll_weight": 1.0}], None),
    ({"loss_type": "cpo", "norm": False}, False, [{"name": "cpo", "beta": 0.1, "nll_weight": 1.0}], None),
    ({"loss_type": "cpo"}, True, [{"name": "sigmoid_norm", "beta": 0.1}, {"name": "sft"}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - l - v + k)) - w),
    ({"loss_type": "cpo", "norm": False}, True,
     [{"name": "simpo", "beta": 0.1, "target_margin": 0.0, "nll_weight": 1.0}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - l)) - w),
    ({"loss_type": "orpo", "beta": 1, "lambda_": 0.3, "ce_coef": 2}, True,
     [{"name": "orpo", "weight": 2.0, "odds_weight": 0.15}],
     lambda w, l, v, k: -2 * w - 0.3 * logsigmoid(odds(w) - odds(l))),
    ({"loss_type": "orpo"}, True, [{"name": "orpo", "weight": 1.0, "odds_weight": 1.0}], None),
    ({"loss_type": "simpo", "beta": 2, "gamma": 0.3}, True, [{"name": "simpo", "beta": 2.0, "target_margin": 0.6}],
     lambda w, l, v, k: -logsigmoid(2 * (w - l - 0.3))),
    ({"loss_type": "asft", "beta": 1, "lambda_": 0.5}, True, [{"name": "asft", "weight": 1.0, "odds_weight": 0.5}],
     lambda w, l, v, k: -w - 0.5 * (logsigmoid(odds(w)) + logsigmoid(-odds(l)))),
    ({"loss_type": "apo_zero"}, False, [{"name": "apo_zero", "beta": 0.1}],
     lambda w, l, v, k: 1 - (0.1 * (w - v)).sigmoid() + (0.1 * (l - k)).sigmoid()),
    ({"loss_type": "apo_down"}, False, [{"name": "apo_down", "beta": 0.1}],
     lambda w, l, v, k: (0.1 * (w - v)).sigmoid() + 1 - (0.1 * (w - l - v + k)).sigmoid()),
    ({"loss_type": "dpop"}, False, [{"name": "dpop", "beta": 0.1, "penalty": 0.1}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - l - v + k - 0.1 * relu(v - w)))),
    ({"loss_type": "nca_pair"}, False, [{"name": "nca_pair", "beta": 0.1}],
     lambda w, l, v, k: -logsigmoid(0.1 * (w - v)) - (logsigmoid(0.1 * (v - w)) + logsigmoid(0.1 * (k - l))) / 2),
    ({"loss_type": "cal_dpo"}, False, [{"name": "cal_dpo", "beta": 0.1}],
     lambda w, l, v, k: -logsigmoid(w - l - v + k) + (w - v - 5) ** 2 + (l - k + 5) ** 2),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "means", "expected", "formula"), LOSSES)
def test_each_loss_has_its_name_here_and_its_value(settings, means, expected, formula):
    module, data, _ = converted(with_loss(means, **settings))
    assert module["losses"] == expected and data["kind"] == "preferences"
    configs = [LossConfig(**each) for each in expected]
    if formula is not None:
        sides = [(side.policy, side.reference, side.lengths if means else 1) for side in (CHOSEN, REJECTED)]
        (w, v), (l, k) = [(policy / number, reference / number) for policy, reference, number in sides]
        ours = sum(config.weight * pair_loss(config, PAIRS) for config in configs)
        torch.testing.assert_close(ours, formula(w, l, v, k))


def test_all_old_losses_are_covered():
    assert {settings["loss_type"] for settings, *_ in LOSSES} == set(preference.LOSSES)
    with pytest.raises(ConfigError, match=r"loss_settings\.loss_type is 'exo'; turbo-alignment has apo_down, apo_zero"):
        converted(with_loss(loss_type="exo"))


NOTES = [
    ({"loss_type": "sigmoid_with_margin"}, False, preference.NO_MARGINS),
    ({"loss_type": "slic_hf", "lam": 0.1}, False, preference.SLIC_MARGIN),
    ({"loss_type": "cpo"}, False, preference.LIKELIHOOD),
    ({"loss_type": "kto"}, False, preference.PAIRED_Z),
    ({"loss_type": "orpo"}, True, preference.ODDS_BETA),
    ({"loss_type": "sigmoid", "label_smoothing": 0.1}, True, preference.NO_SMOOTHING),
    ({"loss_type": "simpo"}, False, preference.NEEDS_MEANS.format(kind="simpo")),
    ({"loss_type": "hinge"}, True, preference.SUMS.format(name="hinge")),
]
QUIET = [
    ({"loss_type": "cpo"}, True, preference.LIKELIHOOD),
    ({"loss_type": "orpo", "beta": 1}, True, preference.ODDS_BETA),
    ({"loss_type": "sigmoid", "label_smoothing": 0}, True, preference.NO_SMOOTHING),
    ({"loss_type": "simpo"}, True, preference.NEEDS_MEANS.format(kind="simpo")),
]


@pytest.mark.parametrize(("settings", "means", "text"), NOTES)
def test_what_a_loss_did_otherwise_there_is_said(settings, means, text):
    assert converted(with_loss(means, **settings))[2].count(f": {text}") == 1


@pytest.mark.parametrize(("settings", "means", "text"), QUIET)
def test_what_a_loss_did_as_here_is_not_said(settings, means, text):
    assert text not in converted(with_loss(means, **settings))[2]


def test_defaults_are_those_of_the_section():
    """Losses in training_arguments had the defaults of their own functions."""
    assert converted(with_loss(loss_type="hinge"))[0]["losses"] == [{"name": "hinge", "beta": 0.1}]
    newer = converted(with_loss(section="training_arguments", loss_type="hinge"))[0]["losses"]
    assert newer == [{"name": "hinge_reference_free", "beta": 0.1}]
    assert preference.ODDS_BETA not in converted(with_loss(True, "training_arguments", loss_type="orpo"))[2]
    loss = converted(with_loss(section="training_arguments", loss_type="slic_hf"))[0]["losses"][0]
    assert loss == {"name": "slic", "weight": 1.0, "target_margin": 1.0, "nll_weight": 0.0}


@pytest.mark.parametrize(("model", "second", "reference", "said"), [
    ({"peft_settings": {"name": "LORA"}}, True, None, None),
    ({"peft_settings": {"name": "LORA"}}, False, None, None),
    ({"adapter_path": "models/a", "is_trainable": True}, True, None, None),
    ({"adapter_path": "models/a", "is_trainable": True}, False, "adapter_off", None),
    ({}, True, None, preference.CACHED),
    ({}, False, None, preference.NO_ADAPTERS),
])  # fmt: skip
def test_the_reference_is_the_one_there(model, second, reference, said):
    values = old("dpo")
    del values["model_settings"]["peft_settings"]
    values["model_settings"] |= model
    values["trainer_settings"]["use_ref_model"] = second
    del values["trainer_settings"]["sync_ref_settings"]
    module, _, notes = converted(values)
    assert module.get("reference") == reference and "reference_sync" not in module
    for text in (preference.CACHED, preference.NO_ADAPTERS):
        assert (text in notes) == (text == said)


@pytest.mark.parametrize(
    "model", [{"peft_settings": {"name": "LORA"}}, {"adapter_path": "a", "is_trainable": True}, {}]
)
def test_a_reference_that_followed_follows(model):
    values = old("dpo")
    del values["model_settings"]["peft_settings"]
    values["model_settings"] |= model
    module, _, notes = converted(values)
    assert module["reference_sync"] == {"every_n_steps": 64, "mix": 0.6} and "reference" not in module
    assert preference.SYNC in notes and preference.CACHED not in notes
    values["trainer_settings"]["sync_ref_settings"] = {"sync_ref_model": True}
    assert converted(values)[0]["reference_sync"] == {"every_n_steps": 1, "mix": 1.0}
    values["trainer_settings"]["use_ref_model"] = False
    module, _, notes = converted(values)
    assert "reference_sync" not in module and preference.NO_SYNC in notes


def test_a_loss_without_a_reference_has_none():
    module, _, notes = converted(with_loss(True, loss_type="simpo"))
    assert "reference" not in module
    assert "trainer_settings.use_ref_model: simpo: nothing is compared with a reference" in notes


def test_kto_keeps_its_weights_or_gets_those_of_there():
    module, data, _ = converted(old("kto"), "train_kto")
    loss = {"name": "kto", "beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    assert module["losses"] == [loss] and module["reference"] == "adapter_off"
    assert data["kind"] == "outcomes" and data["encoding"]["truncation"] == "keep_start"
    values = old("kto") | {"training_arguments": {}}
    loss = {"name": "kto", "beta": 0.1, "desirable_weight": 1.33, "undesirable_weight": 1.0}
    assert converted(values, "train_kto")[0]["losses"] == [loss]


def test_ddpo_has_its_settings_beside_the_trainers_or_among_them():
    loss = {"name": "ddpo", "beta": 0.2, "forward_kl": True}
    assert converted(old("ddpo"), "train_ddpo")[0]["losses"] == [loss]
    for forward in (True, False):
        p, q = (0.2 * (CHOSEN.ratio - REJECTED.ratio)).sigmoid(), PAIRS.margins.sigmoid()
        first, second = (q, p) if forward else (p, q)
        there = first * (first / second).log() + (1 - first) * ((1 - first) / (1 - second)).log()
        torch.testing.assert_close(pair_loss(LossConfig(**loss | {"forward_kl": forward}), PAIRS), there)
    values = old("ddpo")
    values["training_arguments"] = {key: values.pop(key) for key in ("beta", "forward_kl", "use_ref_model")}
    module, data, _ = converted(values, "train_ddpo")
    assert module["losses"] == [loss] and data["encoding"]["truncation"] == "keep_end"


def test_both_responses_keep_the_end_of_their_prompt_and_nothing_else_counts():
    _, data, _ = converted(old("dpo"))
    assert data["encoding"]["truncation"] == "keep_end" and data["encoding"]["max_length"] == 120
    assert data["encoding"]["random_cut"] and "loss_on" not in data["encoding"]


@pytest.mark.parametrize(("settings", "named"), [
    ({"loss_type": "ipo", "beta": 0}, r"loss_settings\.beta is 0\.0"),
    ({"loss_type": "orpo", "ce_coef": 0}, r"loss_settings\.ce_coef is 0\.0"),
    ({"loss_type": "sigmoid", "label_smoothing": 0.7}, "label_smoothing is 0.7"),
    ({"loss_type": "dpop", "lam": -1}, "penalty is -1.0"),
])  # fmt: skip
def test_a_loss_that_is_not_defined_is_one_message(settings, named):
    with pytest.raises(ConfigError, match=named):
        converted(with_loss(**settings))


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "means"), [case[:2] for case in LOSSES])
def test_each_converted_loss_is_accepted_by_the_command(settings, means, tmp_path, monkeypatch):
    monkeypatch.setattr(AlignmentCLI, "instantiate_classes", lambda self: None)
    (tmp_path / "old.json").write_text(json.dumps(with_loss(means, **settings)))
    main([str(tmp_path / "old.json")])
    losses = build(["--config", str(tmp_path / "old.yaml")]).config.model.init_args.losses
    assert [loss.name for loss in losses]
