"""train_classification and inference_classification."""

from typing import Any

from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import Method, training_document
from lit_alignment.tools.convert.inference import scored_documents
from lit_alignment.tools.convert.model import labels
from lit_alignment.tools.convert.settings import Settings
from lit_alignment.tools.convert.trainer import section

SINGLE = "records of one message were dropped there; here they are kept"
FOCAL = (
    "there the focal factor came from the weighted loss, which is another power of the probability; here it comes from "
    "the probability of the true class"
)
BALANCED = "a class that did not occur in the training data shifted the weights there; here its weight is 1"
METRICS = (
    "f1, precision and recall were weighted by class there; val/weighted_f1 is, val/precision and val/recall are means"
)
AUROC = "roc_auc was that of the logits of class 1 there; here it is a mean over each class against the rest"


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    notes, old = top.notes, section(top).part("loss_settings")
    module: dict[str, Any] = {"labels": labels(top.part("model_settings"))}
    alpha, gamma = old.raw("alpha"), old.take("gamma", 0.0)
    if alpha == "auto":
        module["class_weights"] = "balanced"
        notes.warn(f"{old.path_of('alpha')} -> model.class_weights", BALANCED)
    elif isinstance(alpha, list) and all(isinstance(a, int | float) and not isinstance(a, bool) for a in alpha):
        module["class_weights"] = [float(weight) for weight in alpha]
    elif alpha is not None:
        notes.leave_out(old.path_of("alpha"), "turbo-alignment takes 'auto', a list of numbers or null there")
    if gamma:
        module["focal_gamma"] = gamma
        if "class_weights" in module:
            notes.warn(f"{old.path_of('gamma')} -> model.focal_gamma", FOCAL)
    for name in ("train_dataset_settings", "val_dataset_settings"):
        top.part(name).leave_out("labels of tokens play no part", "add_labels")
    notes.warn("train_dataset_settings", SINGLE)
    method = Method("Classification", "classification", scores=True, module=module, remarks=(METRICS, AUROC))
    return [training_document(top, method)]


def convert_inference(top: Settings) -> list[Document]:
    """Our configurations for `predict`, one a model."""

    def module(model: Settings) -> dict[str, Any]:
        named = {"num_labels", "id2label"} & model.part("model_kwargs").values.keys()
        return {"labels": labels(model)} if named else {}  # else those of the exported classifier

    return scored_documents(top, "Classification", "classes of conversations", module)
