"""How does preparing data grow with the number of records?

    python benchmarks/data_scale.py                          # 10,000, 100,000 and 1,000,000 records
    python benchmarks/data_scale.py --records 10000          # some of them
    python benchmarks/data_scale.py --against-template       # and the encoder against apply_chat_template

Records are conversations of two exchanges with about 120 tokens each, under the tokenizer and template of Llama 3.1,
which is fetched from a package index. Each size runs in a process of its own: reading, checking, encoding into the
cache, and what a training needs before its first batch; then once more from the cache. Memory is the largest of any
process (pages that it shares with the others included), less what the imports took.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chat_templates import fetch
from transformers import AutoTokenizer

from lit_alignment import SFTDataModule
from lit_alignment.data.encoding.encoder import Encoder, EncodingConfig
from lit_alignment.data.encoding.messages import read_record
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.paths import cache_dir

WORDS = re.findall(r"[a-z]+", Path("README.md").read_text(encoding="utf-8"))
ROUNDS = 7


def write_records(path: Path, number: int) -> None:
    """Conversations of two exchanges, about 120 tokens each with their headers."""
    choose = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            messages = []
            for _ in range(2):
                messages.append({"role": "user", "content": " ".join(choose.choices(WORDS, k=45))})
                messages.append({"role": "assistant", "content": " ".join(choose.choices(WORDS, k=60))})
            file.write(json.dumps({"id": f"r{index}", "messages": messages}) + "\n")


def prepare(tokenizer: str, records: str, cache: str) -> None:
    """Encode, or load from the cache, up to the first batch; print what it took as JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    data = SFTDataModule(
        AutoTokenizer.from_pretrained(tokenizer), train=[SourceConfig(records)], val=[SourceConfig(records, num_rows=8)]
    )
    data.cache_dir = Path(cache)
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    seconds = time.perf_counter() - begin
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = {"seconds": seconds, "gib": (largest - before) / 2**20, "tokens": data.reports["train"].tokens}
    print(json.dumps(result), flush=True)


def run_apart(*arguments: str) -> dict[str, float]:
    """`prepare` in a process of its own."""
    command = [sys.executable, __file__, "--prepare", *arguments]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    found: dict[str, float] = json.loads(lines[-1])
    return found


def against_template(tokenizer: str, folder: Path) -> None:
    """Print how long the encoder takes, against rendering and tokenising by transformers; they take turns."""
    write_records(folder / "few.jsonl", 1500)
    raw = [json.loads(line) for line in (folder / "few.jsonl").read_text(encoding="utf-8").splitlines()]
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    encoder = Encoder(loaded, EncodingConfig())
    short = Encoder(loaded, EncodingConfig(max_length=160))
    ratios: dict[str, list[float]] = {"encoder": [], "encoder, all shortened": []}
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for each in raw:
            loaded.apply_chat_template(each["messages"], tokenize=True, return_dict=False)
        theirs = time.perf_counter() - begin
        for name, used in (("encoder", encoder), ("encoder, all shortened", short)):
            begin = time.perf_counter()
            for number, each in enumerate(raw):
                used.encode(read_record(each, "f", number))
            ratios[name].append((time.perf_counter() - begin) / theirs)
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} times as long as apply_chat_template(tokenize=True)")


def main() -> None:
    """Print a line for each number of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "chat_templates", help="of the tokenizers")
    parser.add_argument("--against-template", action="store_true")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(*arguments.prepare)
        return
    fetch(arguments.folder)
    tokenizer = str(arguments.folder / "llama3_1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.against_template:
            against_template(tokenizer, folder)
        print("| records | records/s | tokens/s | peak memory | start from the cache | its memory | cache / records |")
        print("|---|---|---|---|---|---|---|")
        for number in arguments.records:
            file, cache = folder / "records.jsonl", folder / f"cache-{number}"
            write_records(file, number)
            first, again = (run_apart(tokenizer, str(file), str(cache)) for _ in range(2))
            size = sum(each.stat().st_size for each in cache.rglob("*")) / file.stat().st_size
            print(
                f"| {number:,} | {number / first['seconds']:.0f} | {first['tokens'] / first['seconds']:.0f} | "
                f"{first['gib']:.2f} GiB | {again['seconds']:.1f} s | {again['gib']:.2f} GiB | {size:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
