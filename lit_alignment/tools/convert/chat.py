"""Sources, and how conversations become tokens."""

from pathlib import PurePath
from typing import Any

from lit_alignment.tools.convert.settings import Settings, shorten

IDS = "records of one file with the same id became one there, the last; here they stop the run with file and line"
DRAW = "drawn from the global generator there, so it depended on what ran before; here from data.seed and the source"
RATE = "kept by a generator of the data set there; here by one of data.seed and the source, so other records are kept"
UPSAMPLE = "a rate above 1 counted as 1 there, and so it does here; repeat: 2.0 shows each record twice an epoch"
JSONL = "read as JSON lines there; here the ending tells the format, so rename the file to .jsonl"
EXACT = (
    "a conversation that filled the limit exactly was dropped there, and BOS and EOS were counted differently with "
    "each setting; here one of max_length tokens, BOS and EOS included, is kept"
)
TOO_LONG = (
    "a record whose single messages are too long vanished there without a word; here data_report.json counts it as "
    "too_long, and truncation_unit: tokens keeps a part of it"
)
KEEP_END = (
    "there trailing messages that were left out still used up the limit, and a record's own system message was cut "
    "off first; here the limit counts what is kept, and a system message stays"
)
REATTACH = (
    "there the first kept message took the place of the source's system prompt when a conversation was cut at the "
    "start; here the system prompt itself stays in front"
)
LAST_REPLICA = (
    "after such a cut the last response was counted one off there, and nothing at all was trained; here the last "
    "response is trained"
)
PREFIX_SEARCH = (
    "everything before the first token of a bot's prefix was cut off there, so with prefixes that begin with the role "
    "the first question was never seen; here nothing is cut"
)
NULL_LENGTH = "null stopped the run there; here encoding.max_length is left at its default of 2048"
RANDOM_CUT = "had no effect there; here each prompt is cut before a random response, chosen by data.seed and its id"
EOS = (
    "with single_eos false the closing EOS was not trained there, so only the suffix taught the model to stop; here "
    "append_eos trains it"
)
NO_EOS = "no suffix closes a message, so nothing taught the model to stop there; here append_eos adds a trained EOS"
# Settings of a chat data set that stand here once, for all splits, with their defaults there.
SHARED: dict[str, Any] = {
    "prompt_template": None,
    "max_tokens_count": None,
    "keep_end": False,
    "only_answer_loss": True,
    "only_last_replica_loss": False,
    "ignore_system_prompt": False,
    "single_eos": True,
}


def sources(dataset: Settings) -> list[dict[str, Any]]:
    """Our sources of a data set."""
    if "sources" not in dataset:
        dataset.notes.missing.append(dataset.path_of("sources"))
    return [source for old in dataset.parts("sources") if (source := _source(old)) is not None]


def _source(old: Settings) -> dict[str, Any] | None:
    notes = old.notes
    source: dict[str, Any] = {}
    path, records = old.maybe("records_path", str), old.maybe("records_data", list)
    if records is not None:
        source["records"] = records
        if path is not None:
            notes.leave_out(old.path_of("records_path"), "records_data goes first, as there")
    elif path is not None:
        source["path"] = path
        notes.warn(f"{old.path}.id", IDS)
        if PurePath(path).suffix != ".jsonl":
            notes.warn(old.path_of("records_path"), JSONL)
    else:
        notes.missing.append(f"{old.path_of('records_path')} or records_data")
    source |= {
        ours: value
        for theirs, ours, kind in (
            ("name", "name", str),
            ("system_prompt", "system_prompt", str),
            ("offset", "offset", int),
            ("n_rows", "num_rows", int),
            ("num_samples", "num_samples", int),
        )
        if (value := old.maybe(theirs, kind)) is not None
    }
    if "num_samples" in source:
        notes.warn(old.path_of("num_samples"), DRAW)
    rate = old.maybe("sample_rate", float)
    if rate is not None and rate <= 0:
        notes.leave_out(old.path, "its sample_rate keeps no record")
        return None
    if rate is not None and rate > 1:
        notes.warn(old.path_of("sample_rate"), UPSAMPLE)
    if rate is not None and rate < 1:
        notes.warn(old.path_of("sample_rate"), RATE)
        source["sample_rate"] = rate
    return source


def encoding(dataset: Settings, others: list[Settings], prompts: Settings | None = None) -> dict[str, Any]:
    """Our `data.encoding`.

    Args:
        dataset: The data set whose settings hold.
        others: Further data sets; where they say something else, that is noted.
        prompts: The one of all these that is answered, if any: the only one that random_cut concerns.
    """
    notes = dataset.notes
    for other in others:
        for key, default in SHARED.items():
            value = other.raw(key)
            if value is not None and value != dataset.values.get(key, default):
                text = f"{shorten(value)}; here one encoding serves all, that of {dataset.path}"
                notes.leave_out(other.path_of(key), text)
    for each in (dataset, *others):
        _check_type(each)
        each.leave_out("there is one way to tokenise here", "use_trl_tokenization")
        each.leave_out("the seed of all choices is data.seed", "random_cut_seed")
        if each is not prompts and each.take("random_cut", False):
            notes.leave_out(each.path_of("random_cut"), "it cuts prompts, and these are training examples")
    ours: dict[str, Any] = {"template": _template(dataset)}
    max_length = dataset.maybe("max_tokens_count", int)
    if "max_tokens_count" not in dataset:
        notes.missing.append(dataset.path_of("max_tokens_count"))
    elif max_length is None:
        notes.warn(dataset.path_of("max_tokens_count"), NULL_LENGTH)
    else:
        ours["max_length"] = max_length
        notes.warn(dataset.path_of("max_tokens_count"), EXACT)
        notes.warn(dataset.path_of("max_tokens_count"), TOO_LONG)
    ours["truncation"] = "keep_end" if dataset.take("keep_end", False) else "keep_start"
    ours["loss_on"] = "assistant" if dataset.take("only_answer_loss", True) else "all"
    if dataset.take("only_last_replica_loss", False):
        ours["loss_on"] = "last_assistant"
    _warn_of_cuts(dataset, others, ours)
    if dataset.take("ignore_system_prompt", False):
        ours["ignore_system_prompt"] = True
    if prompts is not None and prompts.take("random_cut", False):
        ours["random_cut"] = True
        notes.warn(f"{prompts.path_of('random_cut')} -> data.encoding.random_cut", RANDOM_CUT)
    return ours


def _check_type(dataset: Settings) -> None:
    kind = dataset.take("dataset_type", "chat")
    if kind not in ("chat", "multimodal"):
        dataset.notes.leave_out(dataset.path_of("dataset_type"), f"'{kind}' is read as chat")


def _template(dataset: Settings) -> dict[str, Any]:
    notes, old = dataset.notes, dataset.part("prompt_template")
    if "prompt_template" not in dataset:
        notes.missing.append(dataset.path_of("prompt_template"))
        return {}
    prefix, suffix = old.maybe("prefix_template", str), old.maybe("suffix_template", str)
    missing = [n for n, v in (("prefix_template", prefix), ("suffix_template", suffix)) if v is None]
    notes.missing += [old.path_of(name) for name in missing]
    append_eos = not dataset.take("single_eos", True)
    if append_eos:
        notes.warn(f"{dataset.path_of('single_eos')} -> data.encoding.template.append_eos", EOS)
    elif not suffix:
        append_eos = True
        notes.warn(f"{old.path_of('suffix_template')} -> data.encoding.template.append_eos", NO_EOS)
    if prefix is not None and "{role}" in prefix and not prefix.partition("{role}")[0].strip():
        notes.warn(old.path_of("prefix_template"), PREFIX_SEARCH)
    names: dict[str, Any] = old.maybe("role_tag_mapping", dict) or {}
    return {"prefix": prefix, "suffix": suffix, "role_names": names, "append_eos": append_eos}


def _warn_of_cuts(dataset: Settings, others: list[Settings], ours: dict[str, Any]) -> None:
    """Say what was wrong with conversations that are cut at their start."""
    if ours["truncation"] != "keep_end":
        return
    notes, key = dataset.notes, dataset.path_of("keep_end")
    notes.warn(f"{key} -> data.encoding.truncation", KEEP_END)
    if any(old.values.get("system_prompt") for each in (dataset, *others) for old in each.parts("sources")):
        notes.warn(key, REATTACH)
        if ours["loss_on"] == "last_assistant":
            notes.warn(dataset.path_of("only_last_replica_loss"), LAST_REPLICA)
