"""Generation settings and cherry picks."""

from typing import Any

from lit_alignment.tools.convert.chat import sources
from lit_alignment.tools.convert.settings import Notes, Settings

# The names of metrics there and here.
METRICS = {
    "accuracy": "exact_match",
    "length": "length",
    "dist_n": "distinct",
    "diversity": "diversity",
    "self_bleu": "self_bleu",
    "rouge": "rouge",
    "perplexity": "perplexity",
    "kl": "kl",
    "reward": "reward",
    "retrieval_utility": "retrieval_utility",
}
FIRST_TOKEN = "the first token of an answer was never scored there; here it is"
METRIC_FAULTS = {
    "accuracy": "failed there where the tokenizer had no pad token; here texts are compared",
    "diversity": "counted BOS as a part of the answer there; here it does not",
    "self_bleu": "compared characters there; here words",
    "rouge": "its columns reached no table there; here they do",
    "perplexity": FIRST_TOKEN,
    "kl": FIRST_TOKEN,
}
TABLES = "each evaluation logged a table of another name there; here all are in one report, cherry_picks.html"
EVERY_RECORD = "all records are answered at each validation, as there; lower num_samples to answer fewer"
PIECES = (
    "under vLLM a stop string was split into tokens there, and each of them alone ended an answer; here the whole "
    "string does"
)
MISASSIGNED = (
    "with a batch above 1 and several answers to a prompt, answers went to the wrong prompts or were lost there; here "
    "each prompt has its own"
)
BEST_OF = "it was ignored there"
META = "under vLLM a record's meta was lost there; here it is in the predictions"
OLDER_EOS = "the oldest configurations name the end of turn so; it is among the stop strings"


def generation(old: Settings, custom: Settings, sampled: bool = True) -> dict[str, Any]:
    """Our generation settings.

    Args:
        old: The generator's settings, of transformers or vLLM, which differ in the names of two keys.
        custom: What was set beside them.
        sampled: Whether answers are sampled unless do_sample says otherwise.
    """
    ours: dict[str, Any] = {"max_new_tokens": old.take("max_new_tokens", old.take("max_tokens", 15))}
    answers = old.take("num_return_sequences", old.take("n", 1))
    beams = old.take("num_beams", 1)
    temperature, top_p, top_k = old.take("temperature", 1.0), old.take("top_p", 1.0), old.take("top_k", 50)
    if old.take("do_sample", sampled) and temperature > 0:
        ours |= {"temperature": temperature, "top_p": top_p, "top_k": max(0, top_k)}  # -1 is no limit under vLLM
    else:
        ours["temperature"] = 0.0
    if beams > 1:
        ours["num_beams"] = beams
    if answers > 1:
        ours["num_return_sequences"] = answers
    if (penalty := old.take("repetition_penalty", 1.0)) != 1.0:
        ours["repetition_penalty"] = penalty
    stops = old.texts("stop_strings") if "stop_strings" in old else ["</s>"]
    if (closing := custom.maybe("generation_eos_token", str)) is not None:
        custom.notes.warn(custom.path_of("generation_eos_token"), OLDER_EOS)
        stops += [closing] if closing not in stops else []
    ours["stop_strings"] = stops
    ours |= {name: False for name in ("skip_special_tokens", "remove_prompt") if not custom.take(name, True)}
    if old.raw("logprobs"):
        ours["logprobs"] = True
    old.leave_out(BEST_OF, "best_of")
    old.leave_out("answers cannot be limited to a list of tokens", "filter_token_ids")
    old.leave_out("generation always uses the cache", "use_cache")
    custom.leave_out("logits are not kept; logprobs: true gives the answer's log-probability", "return_logits")
    custom.leave_out("logits are not kept", "only_answer_logits")
    return ours


def cherry_picks(old: Settings, adapters: bool) -> dict[str, Any]:
    """Our CherryPicks callback.

    Args:
        old: The old cherry_pick_settings.
        adapters: Whether adapters train, so that the model before training is at hand.
    """
    notes = old.notes
    given = "generation_config" if "generation_config" in old else "generator_transformers_settings"
    custom = old.part("custom_generation_settings")
    # The newer form was transformers' own class, which is greedy unless told otherwise.
    settings = generation(old.part(given), custom, sampled=given == "generator_transformers_settings")
    found = sources(old.part("dataset_settings"))
    sizes = [_size(source) for source in found]
    if None in sizes:
        notes.warn(f"{old.path}.dataset_settings -> CherryPicks.num_samples", EVERY_RECORD)
    ours: dict[str, Any] = {
        "sources": found,
        "num_samples": 1_000_000 if None in sizes else sum(size or 0 for size in sizes),
        "generation": settings,
        "before_training": False,
    }
    if "batch" in custom:
        ours["batch_size"] = custom.take("batch", 1)
        warn_of_batches(notes, custom.path_of("batch"), ours["batch_size"], settings)
    ours["metrics"] = []
    for metric in old.parts("metric_settings"):
        ours |= _reward_model(metric)
        name = _metric(metric, adapters)
        if name is not None and name not in ours["metrics"]:
            ours["metrics"].append(name)
    notes.warn(old.path, TABLES)
    return {"class_path": "lit_alignment.CherryPicks", "init_args": ours}


def scored_picks(old: Settings) -> dict[str, Any]:
    """Our ScoredPicks callback.

    Args:
        old: The old cherry_pick_settings.
    """
    found = sources(old.part("dataset_settings"))
    sizes = [_size(source) for source in found]
    if None in sizes:
        old.notes.warn(f"{old.path}.dataset_settings -> ScoredPicks.num_samples", EVERY_RECORD)
    number = 1_000_000 if None in sizes else sum(size or 0 for size in sizes)
    old.part("dataset_settings").leave_out("labels of tokens play no part", "add_labels")
    old.leave_out("all metrics are always there, of the whole validation data", "metric_settings")
    answered = ("generator_transformers_settings", "custom_generation_settings", "generation_config")
    old.leave_out("nothing is generated", *answered)
    old.notes.warn(old.path, TABLES)
    arguments = {"sources": found, "num_samples": number, "before_training": False}
    return {"class_path": "lit_alignment.ScoredPicks", "init_args": arguments}


def warn_of_batches(notes: Notes, key: str, batch: int, settings: dict[str, Any]) -> None:
    """Say that answers were mixed up where they were."""
    if batch > 1 and settings.get("num_return_sequences", 1) > 1:
        notes.warn(key, MISASSIGNED)


def _size(source: dict[str, Any]) -> int | None:
    """The number of records that a source gives at most, where the settings tell it."""
    records = source.get("records")
    limits = [source.get("num_samples"), source.get("num_rows"), None if records is None else len(records)]
    known = [int(limit) for limit in limits if limit is not None]
    return min(known) if known else None


def _reward_model(old: Settings) -> dict[str, Any]:
    """Where the reward model is, for the metric that asks for one."""
    if old.values.get("type") != "reward":
        return {}
    model = old.part("parameters").part("model_settings")
    path = model.maybe("model_path", str)
    others = [key for key in model.values if key != "model_path"]
    model.leave_out("the reward model is loaded as its folder says", *others)
    return {} if path is None else {"reward_model": path}


def _metric(old: Settings, adapters: bool) -> str | None:
    """Our name of a metric, or None where there is none or it lacks what it needs."""
    name = old.need("type", str)
    parameters = old.part("parameters")
    parameters.leave_out("a metric gives both, its mean as a curve and its values in the report", "need_average")
    others = [key for key in parameters.values if key not in ("need_average", "model_settings")]
    parameters.leave_out("a metric has its own settings here", *others)
    reason = ""
    if name not in METRICS:
        reason = f"there is no metric '{name}'"
    elif name == "kl" and not adapters:
        reason = "kl needs adapters, since it compares with the model without them"
    elif name == "reward" and not parameters.part("model_settings").maybe("model_path", str):
        reason = "reward needs a model: set CherryPicks.reward_model"
    if reason:
        old.notes.leave_out(f"{old.path_of('type')} '{name}'", reason)
        return None
    if name in METRIC_FAULTS:
        old.notes.warn(f"{old.path_of('type')} '{name}'", METRIC_FAULTS[name])
    return METRICS[name]
