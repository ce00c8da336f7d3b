"""train_classification and inference_classification."""

from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert.settings import Extras, Settings
from lit_alignment.tools.convert.trainer import section

SINGLE = "records of one message were dropped there; here they are kept"
FOCAL = """there the focal factor came from the weighted loss, which is another power of the probability; here it \
comes from the probability of the true class"""
BALANCED = "a class that did not occur in the training data shifted the weights there; here its weight is 1"
METRICS = """f1, precision and recall were weighted by class there; val/weighted_f1 is, val/precision and val/recall \
are means"""
AUROC = "roc_auc was that of the logits of class 1 there; here it is a mean over each class against the rest"
REMARKS = (METRICS, AUROC)


def loss(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of a classifier that trains: its labels and its loss."""
    old = section(top).part("loss_settings")
    module: dict[str, Any] = {"labels": _labels(top.part("model_settings.model_kwargs"))}
    alpha, gamma = old.raw("alpha"), old.take("gamma", 0.0)
    if alpha == "auto":
        module["class_weights"] = "balanced"
        old.warn(BALANCED, "alpha", "model.class_weights")
    elif isinstance(alpha, list) and all(isinstance(a, int | float) and not isinstance(a, bool) for a in alpha):
        module["class_weights"] = [float(weight) for weight in alpha]
    elif alpha is not None:
        old.leave_out("turbo-alignment takes 'auto', a list of numbers or null there", "alpha")
    if gamma:
        module["focal_gamma"] = gamma
        old.warn(FOCAL, "gamma", "model.focal_gamma", when="class_weights" in module)
    top.warn(SINGLE, "train_dataset_settings")
    return module, {}


def named_labels(top: Settings, old: Settings, folder: str) -> Extras:
    """Further settings of a classifier that predicts: its labels, or those of the exported classifier."""
    given = old.part("model_settings.model_kwargs")
    return {"labels": _labels(given)} if "num_labels" in given or "id2label" in given else {}, {}


def _labels(old: Settings) -> list[str]:
    """Names of a classifier's labels: those of id2label, else numbers; two where nothing is said, as there."""
    names: dict[str, Any] = old.maybe("id2label", dict) or {}
    if names and all(isinstance(name, str) for name in names.values()):
        return [names[key] for key in sorted(names, key=lambda key: (len(key), key))]
    number = old.take("num_labels", 2)
    if number < 2:
        raise ConfigError(f"{old.path_of('num_labels')} is {number}; a classifier has two or more.")
    return [str(index) for index in range(number)]
