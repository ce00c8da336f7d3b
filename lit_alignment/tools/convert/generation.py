"""Generation settings and cherry picks."""

from typing import Any

from lit_alignment.tools.convert.chat import sources
from lit_alignment.tools.convert.document import Method
from lit_alignment.tools.convert.settings import Row, Settings, Table, carry

# The names of metrics there and here.
METRICS = {"accuracy": "exact_match", "dist_n": "distinct"}
METRICS |= {
    name: name
    for name in ("length", "diversity", "self_bleu", "rouge", "perplexity", "kl", "reward", "retrieval_utility")
}
EVERY = 1_000_000  # records: more than there are
FIRST_TOKEN = "the first token of an answer was never scored there; here it is"  # noqa: S105 - of text
METRIC_FAULTS = {
    "accuracy": "failed there where the tokenizer had no pad token; here texts are compared",
    "diversity": "counted BOS as a part of the answer there; here it does not",
    "self_bleu": "compared characters there; here words",
    "rouge": "its columns reached no table there; here they do",
    "perplexity": FIRST_TOKEN,
    "kl": FIRST_TOKEN,
}
TABLES = "each evaluation logged a table of another name there; here all are in one report, report.html"
EVERY_RECORD = "all records are answered at each validation, as there; lower num_samples to answer fewer"
PIECES = """under vLLM a stop string was split into tokens there, and each of them alone ended an answer; here the \
whole string does"""
MISASSIGNED = """with a batch above 1 and several answers to a prompt, answers went to the wrong prompts or were lost \
there; here each prompt has its own"""
BEST_OF = "it was ignored there"
META = "under vLLM a record's meta was lost there; here it is in the predictions"
OLDER_EOS = "the oldest configurations name the end of turn so; it is among the stop strings"
NOT_GENERATED = "nothing is generated"

DECODING: Table = {
    "num_beams": Row(1, changed=True),
    "num_return_sequences": Row(1, changed=True),
    "repetition_penalty": Row(1.0, changed=True),
    "best_of": BEST_OF,
    "filter_token_ids": "answers cannot be limited to a list of tokens",
    "use_cache": "generation always uses the cache",
}
CUSTOM: Table = {
    "skip_special_tokens": Row(True, changed=True),
    "remove_prompt": Row(True, changed=True),
    "return_logits": "logits are not kept; logprobs: true gives the answer's log-probability",
    "only_answer_logits": "logits are not kept",
}


def generation(old: Settings, custom: Settings, sampled: bool = True) -> dict[str, Any]:
    """Our generation settings; answers are `sampled` unless do_sample says otherwise."""
    # vLLM's names of two keys
    old.defaults |= {"max_new_tokens": old.take("max_tokens", 15), "num_return_sequences": old.take("n", 1)}
    ours: dict[str, Any] = {"max_new_tokens": old.take("max_new_tokens", 15), "temperature": 0.0}
    temperature, top_p, top_k = old.take("temperature", 1.0), old.take("top_p", 1.0), old.take("top_k", 50)
    if old.take("do_sample", sampled) and temperature > 0:
        ours |= {"temperature": temperature, "top_p": top_p, "top_k": max(0, top_k)}  # -1 is no limit under vLLM
    listed = isinstance(old.raw("stop_strings"), list)
    stops = [*old.take("stop_strings", [])] if listed else [old.take("stop_strings", "</s>")]
    if (closing := custom.maybe("generation_eos_token", str)) is not None:
        custom.warn(OLDER_EOS, "generation_eos_token")
        stops += [closing] if closing not in stops else []
    ours |= {**carry(old, DECODING), "stop_strings": stops, **carry(custom, CUSTOM)}
    return ours | ({"logprobs": True} if old.raw("logprobs") else {})


def cherry_picks(old: Settings, method: Method, adapters: bool) -> dict[str, Any]:
    """Our callback for the old cherry_pick_settings; with `adapters`, the model before training is at hand."""
    name = "ScoredPicks" if method.scores else "CherryPicks"
    generator, beside = "generator_transformers_settings", "custom_generation_settings"
    ours: dict[str, Any] = {"sources": sources(old.part("dataset_settings")), "num_samples": 0}
    for source in ours["sources"]:
        limits = [source[key] for key in ("num_samples", "num_rows") if key in source]
        limits += [len(source["records"])] if "records" in source else []
        ours["num_samples"] += min(limits, default=EVERY)
    ours["num_samples"] = min(ours["num_samples"], EVERY)
    old.warn(EVERY_RECORD, "dataset_settings", f"{name}.num_samples", when=ours["num_samples"] == EVERY)
    if method.scores:
        old.leave_out("all metrics are always there, of the whole validation data", "metric_settings")
        old.leave_out(NOT_GENERATED, generator, beside, "generation_config")
        ours["before_training"] = False
    else:
        # The newer form was transformers' own class, which is greedy unless told otherwise.
        newer, custom = "generation_config" in old, old.part(beside)
        settings = generation(old.part("generation_config" if newer else generator), custom, sampled=not newer)
        ours |= {"generation": settings, "before_training": False}
        if "batch" in custom:
            ours["batch_size"] = custom.take("batch", 1)
            custom.warn(MISASSIGNED, "batch", when=ours["batch_size"] > 1 and "num_return_sequences" in settings)
        ours |= _metrics(old, adapters)
    old.warn(TABLES)
    return {"class_path": f"lit_alignment.{name}", "init_args": ours}


def _metrics(old: Settings, adapters: bool) -> dict[str, Any]:
    """Our metrics, and the reward model of the metric that asks for one."""
    ours: dict[str, Any] = {"metrics": []}
    for metric in old.parts("metric_settings"):
        name, parameters, reason = metric.need("type"), metric.part("parameters"), ""
        if name == "reward":
            reward = parameters.part("model_settings")
            ours |= carry(reward, {"model_path": Row(str, "reward_model")})
            reward.leave_out_rest("the reward model is loaded as its folder says")
            reason = "" if "reward_model" in ours else "reward needs a model: set CherryPicks.reward_model"
        parameters.leave_out("a metric gives both, its mean as a curve and its values in the report", "need_average")
        parameters.leave_out_rest("a metric has its own settings here")
        if name == "kl" and not adapters:
            reason = "kl needs adapters, since it compares with the model without them"
        if name not in METRICS:
            reason = f"there is no metric '{name}'"
        if reason:
            metric.leave_out(reason, "type", shown=f" '{name}'")
            continue
        if name in METRIC_FAULTS:
            metric.warn(METRIC_FAULTS[name], f"type '{name}'")
        if METRICS[name] not in ours["metrics"]:
            ours["metrics"].append(METRICS[name])
    return ours
