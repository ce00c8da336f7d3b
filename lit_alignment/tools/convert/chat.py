"""Sources, and how conversations become tokens."""

from typing import Any

from lit_alignment.tools.convert.document import Method
from lit_alignment.tools.convert.settings import Row, Settings, Table, carry, shorten

IDS = "records of one file with the same id became one there, the last; here they stop the run with file and line"
DRAW = "drawn from the global generator there, so it depended on what ran before; here from data.seed and the source"
RATE = "kept by a generator of the data set there; here by one of data.seed and the source, so other records are kept"
UPSAMPLE = "a rate above 1 counted as 1 there, and so it does here; repeat: 2.0 shows each record twice an epoch"
JSONL = "read as JSON lines there; here the ending tells the format, so rename the file to .jsonl"
EXACT = """a conversation that filled the limit exactly was dropped there, and BOS and EOS were counted differently \
with each setting; here one of max_length tokens, BOS and EOS included, is kept"""
TOO_LONG = """a record whose single messages are too long vanished there without a word; here data_report.json counts \
it as too_long, and truncation_unit: tokens keeps a part of it"""
KEEP_END = """there trailing messages that were left out still used up the limit, and a record's own system message \
was cut off first; here the limit counts what is kept, and a system message stays"""
REATTACH = """there the first kept message took the place of the source's system prompt when a conversation was cut at \
the start; here the system prompt itself stays in front"""
LAST_REPLICA = """after such a cut the last response was counted one off there, and nothing at all was trained; here \
the last response is trained"""
PREFIX_SEARCH = """everything before the first token of a bot's prefix was cut off there, so with prefixes that begin \
with the role the first question was never seen; here nothing is cut"""
NULL_LENGTH = "null stopped the run there; here encoding.max_length is left at its default of 2048"
RANDOM_CUT = "had no effect there; here each prompt is cut before a random response, chosen by data.seed and its id"
EOS = """with single_eos false the closing EOS was not trained there, so only the suffix taught the model to stop; \
here append_eos trains it"""
NO_EOS = "no suffix closes a message, so nothing taught the model to stop there; here append_eos adds a trained EOS"
RESPONSE_ALONE = "a response counts as a whole, and nothing before it"
READ_WHOLE = "whole conversations are read, and their last token is scored"
NO_LABELS = "labels of tokens play no part"

SOURCE: Table = {
    "name": Row(str),
    "system_prompt": Row(str),
    "offset": Row(int),
    "n_rows": Row(int, "num_rows"),
    "num_samples": Row(int, notes=(DRAW,)),
}
CHAT: Table = {
    "max_tokens_count": Row(int, "max_length", notes=(EXACT, TOO_LONG)),
    "keep_end": Row(False, "truncation", make=lambda end: "keep_end" if end else "keep_start"),
    "only_answer_loss": Row(True, "loss_on", make=lambda only: "assistant" if only else "all"),
    "only_last_replica_loss": Row(False, "loss_on", make=lambda last: "last_assistant" if last else None),
    "ignore_system_prompt": Row(False, changed=True),
}
# Settings that stand here once, for all splits, with their defaults there.
SHARED = {"prompt_template": None, "max_tokens_count": None, "keep_end": False, "only_answer_loss": True}
SHARED |= {"only_last_replica_loss": False, "ignore_system_prompt": False, "single_eos": True}
UNUSED: Table = {
    "use_trl_tokenization": "there is one way to tokenise here",
    "random_cut_seed": "the seed of all choices is data.seed",
}


def sources(dataset: Settings) -> list[dict[str, Any]]:
    """Our sources of a data set."""
    dataset.require("sources")
    return [source for old in dataset.parts("sources") if (source := _source(old))]


def _source(old: Settings) -> dict[str, Any]:
    """Our source for an old one, or nothing where it keeps no record."""
    path, records = old.maybe("records_path", str), old.maybe("records_data", list)
    source: dict[str, Any] = {"path": path} if records is None else {"records": records}
    old.leave_out("records_data goes first, as there", "records_path", when=records is not None)
    old.warn(IDS, "id", when=records is None)
    old.warn(JSONL, "records_path", when=records is None and not str(path).endswith(".jsonl"))
    if path is None and records is None:
        old.notes.missing.append(f"{old.path_of('records_path')} or records_data")
    source |= carry(old, SOURCE)
    rate = old.take("sample_rate", 1.0)
    if rate <= 0:
        old.notes.left_out["its sample_rate keeps no record"].append(old.path)
        return {}
    old.warn(UPSAMPLE, "sample_rate", when=rate > 1)
    old.warn(RATE, "sample_rate", when=rate < 1)
    return source | ({"sample_rate": rate} if rate < 1 else {})


def encoding(method: Method, dataset: Settings, others: list[Settings], prompts: Settings) -> dict[str, Any]:
    """Our `data.encoding`, as `dataset` says it; what `others` say otherwise is noted. Only `prompts` are answered."""
    if not dataset.values:
        return {}
    nested, alone = method.scores or method.compares, READ_WHOLE if method.scores else RESPONSE_ALONE
    first, *rest = whole = [_chat_settings(each) if nested else each for each in (dataset, *others)]
    for other in rest:
        for key, default in SHARED.items():
            if (value := other.raw(key)) not in (None, first.values.get(key, default)):
                text = f"{shorten(value)}; here one encoding serves all, that of {first.path}"
                other.notes.left_out[text].append(other.path_of(key))
    for each in whole:
        kind = each.take("dataset_type", "chat")
        each.leave_out(f"'{kind}' is read as chat", "dataset_type", when=kind not in ("chat", "multimodal"))
        carry(each, UNUSED)
        cut = each.take("random_cut", False) and (method.scores or each is not prompts)
        each.leave_out("it cuts prompts, and these are training examples", "random_cut", when=cut)
    ours = {"template": _template(first), **carry(first, CHAT)}
    first.require("max_tokens_count")
    first.warn(NULL_LENGTH, "max_tokens_count", when="max_tokens_count" in first and "max_length" not in ours)
    cut = ours["truncation"] == "keep_end"
    first.warn(KEEP_END, "keep_end", "data.encoding.truncation", when=cut)
    cut = cut and any(source.values.get("system_prompt") for each in whole for source in each.parts("sources"))
    first.warn(REATTACH, "keep_end", when=cut)
    first.warn(LAST_REPLICA, "only_last_replica_loss", when=cut and ours["loss_on"] == "last_assistant")
    # Both responses to a prompt were cut at their start, whatever was set.
    if method.name == "Reward" or method.compares == "pairs":
        ours["truncation"] = "keep_end"
    if nested:
        del ours["loss_on"]
        for each in whole:
            named = method.scores or each is not prompts
            each.leave_out(alone, "only_answer_loss", "only_last_replica_loss", when=named)
    if not method.scores and prompts.take("random_cut", False):
        ours["random_cut"] = True
        prompts.warn(RANDOM_CUT, "random_cut", "data.encoding.random_cut")
    return ours


def _chat_settings(dataset: Settings) -> Settings:
    """Where a data set of sequences to score says how conversations become tokens."""
    dataset.take("dataset_type", "")
    return next((dataset.part(name) for name in ("chat_settings", "chat_dataset") if name in dataset), dataset)


def _template(dataset: Settings) -> dict[str, Any]:
    old = dataset.part("prompt_template")
    dataset.require("prompt_template")
    if "prompt_template" not in dataset:
        return {}
    prefix, suffix = old.need("prefix_template"), old.need("suffix_template")
    append_eos, ours = not dataset.take("single_eos", True), "data.encoding.template.append_eos"
    dataset.warn(EOS, "single_eos", ours, when=append_eos)
    old.warn(NO_EOS, "suffix_template", ours, when=not append_eos and not suffix)
    old.warn(PREFIX_SEARCH, "prefix_template", when=prefix.strip().startswith("{role}"))
    names: dict[str, Any] = old.maybe("role_tag_mapping", dict) or {}
    return {"prefix": prefix, "suffix": suffix, "role_names": names, "append_eos": append_eos or not suffix}
