"""How good are a classifier and a reward model that are trained on people's ratings of film snippets?

    python benchmarks/vader.py classification     # up to 22 minutes on two CPU cores
    python benchmarks/vader.py reward             # up to 30 minutes

Fetches 10,604 snippets of film reviews, each with the mean of 20 people's ratings from -4 to 4, out of the sdist of
vaderSentiment 0.5 (MIT; Hutto and Gilbert 2014), writes them as records under data/vader, trains as
configs/<method>/vader_smollm2.yaml says, and compares on held-out snippets with scikit-learn and with VADER itself.
`python benchmarks/vader.py data` only writes the records. Needs scikit-learn and vaderSentiment (the dev extra).
"""

import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from lit_alignment.tools.fetch import fetch
from lit_alignment.trainer_cli import build

DATA = Path("data/vader")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "vaderSentiment==0.5"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SIZES = {"test": 1500, "val": 400}  # the rest trains
NEUTRAL = 0.5  # a mean rating nearer to 0 has no class
APART = 1.5  # least difference of the ratings of a pair
ASK = "Say in one sentence how you liked the film."
Snippet = tuple[str, str, float]  # id, text, mean rating


def snippets() -> list[Snippet]:
    """The rated snippets, each text once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, REQUIREMENT], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.zip"))) as sdist:
            name = next(name for name in sdist.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            archive = sdist.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(MEMBER)
        assert file is not None
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    by_text: dict[str, Snippet] = {}
    for line in lines:
        number, rating, text = line.split("\t")
        by_text.setdefault(text.strip(), (number, text.strip(), float(rating)))
    return list(by_text.values())


def split(found: list[Snippet]) -> dict[str, list[Snippet]]:
    """Snippets by split, seeded; none stands in two."""
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = shuffled[start : start + size]
        start += size
    return parts | {"train": shuffled[start:]}


def classes(part: list[Snippet]) -> Iterator[dict[str, object]]:
    """Snippets that people found positive or negative, as classification records."""
    for number, text, rating in part:
        if abs(rating) >= NEUTRAL:
            message = {"role": "user", "content": text}
            label = "positive" if rating > 0 else "negative"
            yield {"id": number, "messages": [message], "label": label, "meta": {"rating": rating}}


def pairs(part: list[Snippet], seed: int) -> Iterator[dict[str, object]]:
    """Each snippet against a random other one whose rating is clearly different; the more positive one is chosen."""
    generator = random.Random(seed)
    for number, text, rating in part:
        others = generator.sample(part, 20)
        other = next((one for one in others if abs(one[2] - rating) >= APART), None)
        if other is None:
            continue
        better, worse = sorted([(rating, text), (other[2], other[1])], reverse=True)
        yield {
            "id": f"{number}-{other[0]}",
            "prompt": ASK,
            "chosen": better[1],
            "rejected": worse[1],
            "meta": {"ratings": [better[0], worse[0]]},
        }


def write_data() -> dict[str, list[Snippet]]:
    """Write the records of both methods, and return the snippets by split."""
    parts = split(snippets())
    DATA.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        for method, records in (("classification", classes(part)), ("reward", pairs(part, len(part)))):
            lines = [json.dumps(record) + "\n" for record in records]
            (DATA / f"{method}.{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{DATA / f'{method}.{name}.jsonl'}: {len(lines)} records")
    return parts


def read(name: str, rows: int | None = None) -> list[dict[str, object]]:
    """The records of one file."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:rows]]


def train_and_test(method: str) -> tuple[dict[str, float], int, float]:
    """Metrics on the held-out records, number of training records, and seconds of training."""
    config = f"configs/{method}/vader_smollm2.yaml"
    fetch(MODEL)
    start = time.perf_counter()
    trained = build(["fit", "--config", config], run=True)
    seconds = time.perf_counter() - start
    best = trained.trainer.checkpoint_callback.best_model_path
    tested = build(["test", "--config", config, f"--ckpt_path={best}"], run=True)
    metrics = {name: float(value) for name, value in tested.trainer.callback_metrics.items()}
    return metrics, len(trained.datamodule.examples["train"]), seconds


def vader(text: str, analyzer: SentimentIntensityAnalyzer) -> float:
    """VADER's compound score, from -1 to 1."""
    return float(analyzer.polarity_scores(text)["compound"])


def tfidf(train: list[dict[str, object]], test: list[dict[str, object]]) -> float:
    """Held-out accuracy of logistic regression on TF-IDF of words and word pairs, its strength chosen by 5 folds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    texts = [[record["messages"][0]["content"] for record in part] for part in (train, test)]
    labels = [[record["label"] for record in part] for part in (train, test)]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    pipeline = make_pipeline(words, LogisticRegression(max_iter=2000))
    model = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 0.3, 1, 3, 10, 30, 100]}, cv=5)
    return float(model.fit(texts[0], labels[0]).score(texts[1], labels[1]))


def classification() -> None:
    """Train the classifier and print its row beside the baselines'."""
    metrics, used, seconds = train_and_test("classification")
    test, train = read("classification.test"), read("classification.train")
    analyzer = SentimentIntensityAnalyzer()
    # A score of 0 says nothing; as in VADER's own evaluation with two classes it counts as positive from 0 on.
    hits = [
        (vader(record["messages"][0]["content"], analyzer) >= 0) == (record["label"] == "positive") for record in test
    ]
    rows = {
        f"SmolLM2-135M, LoRA, {used} snippets": metrics["test/accuracy"],
        f"TF-IDF and logistic regression, the same {used} snippets": tfidf(train[:used], test),
        f"TF-IDF and logistic regression, all {len(train)} snippets": tfidf(train, test),
        "VADER, rules and lexicon": sum(hits) / len(hits),
        "always the more frequent class": max(sum(r["label"] == n for r in test) for n in ("positive", "negative"))
        / len(test),
    }
    print_table("accuracy", rows, len(test), seconds)
    rest = ("macro_f1", "auroc", "average_precision", "calibration_error", "calibration_error_scaled", "temperature")
    print(", ".join(f"{name} {metrics[f'test/{name}']:.3f}" for name in rest))


def reward() -> None:
    """Train the reward model and print its row beside the baselines'."""
    metrics, used, seconds = train_and_test("reward")
    test = read("reward.test")
    analyzer = SentimentIntensityAnalyzer()
    scores = [[vader(str(record[name]), analyzer) for name in ("chosen", "rejected")] for record in test]
    hits = sum(1.0 if better > worse else 0.5 if better == worse else 0.0 for better, worse in scores)
    rows = {
        f"SmolLM2-135M, LoRA, {used} pairs": metrics["test/accuracy"],
        "VADER's compound score (a tie counts half)": hits / len(test),
        "chance": 0.5,
    }
    print_table("pair accuracy", rows, len(test), seconds)
    rest = ("loss", "margin", "chosen_reward", "rejected_reward", "calibration_error")
    print(", ".join(f"{name} {metrics[f'test/{name}']:.3f}" for name in rest))


def print_table(name: str, rows: dict[str, float], number: int, seconds: float) -> None:
    """A Markdown table of held-out figures."""
    print(f"\n| held out: {number} | {name} |\n|---|---|")
    for title, value in rows.items():
        print(f"| {title} | {value:.3f} |")
    print(f"\ntrained in {seconds:.0f} s")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    actions = {"data": lambda: None, "classification": classification, "reward": reward}
    if chosen not in actions:
        sys.exit(__doc__)
    write_data()
    actions[chosen]()
