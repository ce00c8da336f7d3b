"""random_sample, rm_sample and rso_sample: choosing among answers."""

from lit_alignment.tools.convert.chat import encoding, sources
from lit_alignment.tools.convert.document import Document, Method, script
from lit_alignment.tools.convert.inference import prediction
from lit_alignment.tools.convert.settings import Settings, Table, carry

UNSEEDED = "drawn from the global generator there; here from --seed and each record's id"
ONE_SOURCE = "only the first source was read there; here all are"
RSO = """accepted answers stayed in the pool and rejected ones left it there, so fewer than N different answers came \
out; here accepted ones leave it, rejected ones stay, and N are N different ones"""
ALL_KEPT = "N had no effect there, all answers were kept; here the second step keeps the best N"
TWO_STEPS = "Two steps: the first scores, the second chooses. Run this file after the YAML of the same name."
LINES = "the slices and shares of a source are not taken here; the whole file is read"
TOKENS_UNUSED = {"chat_dataset, chat_settings, prompt_template, max_tokens_count": "nothing is turned into tokens"}
SOURCE_UNUSED: Table = {
    "offset, n_rows, num_samples, sample_rate, system_prompt": LINES,
    "name": "a file of the same name gives its name",
    "records_data": "records have to stand in a file",
}


def convert(top: Settings) -> list[Document]:
    """A command that chooses, and before it the scoring, if there is a reward model."""
    top.require("N", "dataset_settings")
    folder, seed, dataset = top.need("save_path"), top.take("seed", 42), top.part("dataset_settings")
    dataset.take("dataset_type", "sampling")
    dataset.warn(ONE_SOURCE, "sources", when=len(dataset.parts("sources")) > 1)
    rest = ["--number", str(top.take("N", 0)), "--seed", str(seed), "--form", "records"]
    rest += ["--out", f"{folder}/sampled.jsonl"]
    if "rm" not in top:
        top.leave_out("only rm and rso score answers", "beta", "rm_batch_size", "tokenizer_settings")
        top.warn(UNSEEDED, "seed")
        files = [old.need("records_path") for old in dataset.parts("sources")]
        for old in dataset.parts("sources"):
            carry(old, SOURCE_UNUSED)
        carry(dataset, TOKENS_UNUSED)
        return [script("random answers", "sample", *files, "--strategy", "random", *rest)]
    method = Method("Reward", "rewards of answers", scores=True, model="rm")
    data = {"predict": sources(dataset), "encoding": encoding(method, dataset, [], dataset), "packing": False}
    data["batch_size"] = top.take("rm_batch_size", 1)
    scoring = prediction(method, top, seed, folder, {}, data)
    top.warn(RSO, "beta", when="beta" in top)
    top.warn(ALL_KEPT, "N", when="beta" not in top)
    strategy = ["rso", "--beta", str(top.take("beta", 1.0))] if "beta" in top else ["best_of_n"]
    command = ["sample", f"{folder}/rewards.jsonl", "--strategy", *strategy, *rest]
    return [scoring, script("the choice among scored answers", *command, remarks=[TWO_STEPS])]
