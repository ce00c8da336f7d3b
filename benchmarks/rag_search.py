"""How long does the exact search take, against FAISS's flat index on the same machine?

    python benchmarks/rag_search.py

100,000 random vectors of 384 numbers (MiniLM's width), 32 queries, 20 passages each. Both search in turn, so that the
machine's drift meets both, and both use all cores; how many passages they share is counted. Memory-mapped vectors are
read from a file that the operating system has in its cache.
"""

import tempfile
import time
from pathlib import Path

import faiss
import torch
from torch.nn.functional import normalize

from lit_alignment.data.passages import Passage
from lit_alignment.retrieval.build import IndexBuilder
from lit_alignment.retrieval.files import Manifest
from lit_alignment.retrieval.index import IndexConfig, PassageIndex

PASSAGES, WIDTH, QUERIES, K, ROUNDS = 100_000, 384, 32, 20, 21


def index(folder: str, embeddings: torch.Tensor, dtype: str) -> PassageIndex:
    """An index in files, as `lit-alignment index build` makes them."""
    config = IndexConfig(f"{folder}/{dtype}", dtype=dtype)
    builder = IndexBuilder(config, Manifest({"path": "random"}, "", WIDTH, dtype, len(embeddings)))
    builder.create([Passage(str(number), text="text") for number in range(len(embeddings))])
    builder.write(range(len(embeddings)), embeddings)
    return PassageIndex.load(builder.finish())


def main() -> None:
    """Print a table over what is searched."""
    torch.manual_seed(0)
    embeddings = normalize(torch.randn(PASSAGES, WIDTH), dim=1)
    queries = normalize(torch.randn(QUERIES, WIDTH), dim=1)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(embeddings.numpy())
    with tempfile.TemporaryDirectory() as folder:
        float32, bfloat16 = (index(folder, embeddings, dtype) for dtype in ("float32", "bfloat16"))
        ways = {
            "FAISS flat": lambda: torch.from_numpy(flat.search(queries.numpy(), K)[1]),
            "exact": lambda: float32.search(queries, K)[1],
            "exact, bfloat16": lambda: bfloat16.search(queries, K)[1],
        }
        seconds = {name: [] for name in ways}
        found = {}
        for _ in range(ROUNDS):
            for name, search in ways.items():
                start = time.perf_counter()
                found[name] = search()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: sorted(each)[ROUNDS // 2] for name, each in seconds.items()}
    print(f"{Path(__file__).name}: {torch.get_num_threads()} threads, FAISS {faiss.omp_get_max_threads()}\n")
    print("| search | median | / FAISS flat | shared passages |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        pairs = zip(found[name].tolist(), found["FAISS flat"].tolist(), strict=True)
        shared = sum(len({*one} & {*other}) for one, other in pairs) / (K * QUERIES)
        print(f"| {name} | {1000 * median:.1f} ms | {median / medians['FAISS flat']:.2f} | {shared:.3f} |")


if __name__ == "__main__":
    main()
