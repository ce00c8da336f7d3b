"""random_sample, rm_sample and rso_sample: choosing among answers."""

import shlex
from pathlib import PurePath
from typing import Any

from lit_alignment.tools.convert.chat import sources
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.fit import scored_encoding
from lit_alignment.tools.convert.inference import scored_document
from lit_alignment.tools.convert.settings import Settings

UNSEEDED = "drawn from the global generator there; here from --seed and each record's id"
ONE_SOURCE = "only the first source was read there; here all are"
RSO = (
    "accepted answers stayed in the pool and rejected ones left it there, so fewer than N different answers came out; "
    "here accepted ones leave it, rejected ones stay, and N are N different ones"
)
ALL_KEPT = "N had no effect there, all answers were kept; here the second step keeps the best N"
TWO_STEPS = "Two steps: the first scores, the second chooses. Run this file after the YAML of the same name."
LINES = "the slices and shares of a source are not taken here; the whole file is read"
PARTS = ("offset", "n_rows", "num_samples", "sample_rate", "system_prompt")


def convert(top: Settings) -> list[Document]:
    """A command that chooses, and before it the scoring, if there is a reward model."""
    notes = top.notes
    number, folder, seed = top.take("N", 0), top.need("save_path", str), top.take("seed", 42)
    if "N" not in top:
        notes.missing.append("N")
    dataset = top.part("dataset_settings")
    if "dataset_settings" not in top:
        notes.missing.append("dataset_settings")
    dataset.take("dataset_type", "sampling")
    if len(dataset.parts("sources")) > 1:
        notes.warn(dataset.path_of("sources"), ONE_SOURCE)
    target = str(PurePath(folder) / "sampled.jsonl")
    command = ["lit-alignment", "sample"]
    if "rm" not in top:
        top.leave_out("only rm and rso score answers", "beta", "rm_batch_size", "tokenizer_settings")
        notes.warn("seed", UNSEEDED)
        command += [*_files(dataset), "--strategy", "random"]
        return [Document("sample", "random answers", shlex.join([*command, *_rest(number, seed, target)]), [])]
    rewards = str(PurePath(folder) / "rewards.jsonl")
    model, tokenizer, data = top.part("rm"), top.part("tokenizer_settings"), _data(top, dataset)
    scoring = scored_document(model, tokenizer, "Reward", "rewards of answers", {}, data, folder, seed, {})
    if "beta" in top:
        notes.warn("beta", RSO)
        command += [rewards, "--strategy", "rso", "--beta", str(top.take("beta", 1.0))]
    else:
        notes.warn("N", ALL_KEPT)
        command += [rewards, "--strategy", "best_of_n"]
    line = shlex.join([*command, *_rest(number, seed, target)])
    return [scoring, Document("sample", "the choice among scored answers", line, [TWO_STEPS])]


def _rest(number: int, seed: int, target: str) -> list[str]:
    return ["--number", str(number), "--seed", str(seed), "--form", "records", "--out", target]


def _data(top: Settings, dataset: Settings) -> dict[str, Any]:
    found = {
        "predict": sources(dataset),
        "encoding": scored_encoding(dataset, [], keep_end=True) if dataset.values else {},
    }
    return found | {"packing": False, "batch_size": top.take("rm_batch_size", 1)}


def _files(dataset: Settings) -> list[str]:
    """The files behind the sources, which a command line reads whole."""
    files = []
    for old in dataset.parts("sources"):
        files.append(old.need("records_path", str))
        old.leave_out(LINES, *PARTS)
        old.leave_out("a file of the same name gives its name", "name")
        old.leave_out("records have to stand in a file", "records_data")
    of_tokens = ("chat_dataset", "chat_settings", "prompt_template", "max_tokens_count")
    dataset.leave_out("nothing is turned into tokens", *of_tokens)
    return files
