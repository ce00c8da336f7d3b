"""Does preference optimisation make a real model better, when it learns from its own answers?

    python -m benchmarks.preference requests          # about 110 minutes on a core that other programs shared
    python -m benchmarks.preference vader
    python -m benchmarks.preference requests --tiny   # every stage on a handful of records, in minutes

`requests`: SmolLM2-135M, fine-tuned on the demo's support requests as configs/sft/smollm2_lora.yaml says, answers 400
training requests eight times; an exact verifier scores the answers, `sample` writes them as rankings, and DPO continues
the adapter on half of these as configs/preference/support_smollm2.yaml says. The same number of optimizer steps more of
SFT is beside it. Exact match on 500 fresh requests whose sentences, products and order numbers are in no training data;
learning rates are chosen on 50 others. The half, its order and that of SFT are drawn with three seeds.

`vader`: the same model is fine-tuned to finish lines about films, and writes eight ends of each line. The best and the
worst by reward model A, of half of the lines, are what DPO and KTO learn from, as configs/preference/vader_smollm2.yaml
says. Reward model B, trained on ratings that A has not seen, judges what they write of 200 other beginnings.

Every stage is a command of lit-alignment, run in this process. What a stage writes stands under data/preference_proof;
a stage whose settings and input files are those of the time before is passed over.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks import vader as ratings
from benchmarks.stages import (
    BFLOAT16,
    EXPORT,
    LAST,
    NO_VALIDATION,
    Model,
    Record,
    Values,
    callbacks,
    continued,
    fit,
    interval,
    predict,
    print_differences,
    read,
    sampling,
    sources,
    stage,
    steps_of,
    write,
)
from benchmarks.support import CHOOSE, HELD_OUT, LONGEST_ROUTE, MODEL, SFT, answered, begun, write_requests
from lit_alignment.tools import evaluate, sample
from lit_alignment.tools.fetch import fetch
from lit_alignment.trainer_cli import build

DATA = Path("data/preference_proof")
REWARD = "configs/reward/vader_smollm2.yaml"
SEEDS = (0, 1, 2)  # the first one's runs choose the learning rates
ANSWERS = 8  # to each prompt


# Support requests.

DPO = "configs/preference/support_smollm2.yaml"
RATES = {"DPO": (1e-5, 3e-5, 1e-4), "SFT continued": (2e-4, 6e-4, 2e-3)}
RANKINGS = 200  # that one training takes, of those of all 400 training requests


def verify(answered: Path, scored: Path) -> tuple[float, float]:
    """Score answers with 1 if they are the reference to the character, else 0.

    Args:
        answered: What predict has written.
        scored: The same lines with `rewards`, as `lit-alignment sample` reads them.

    Returns:
        Share of right answers, and of prompts with both right and wrong ones.
    """
    lines = read(answered)
    for line in lines:
        line["rewards"] = {a["id"]: float(a["content"].strip() == line["label"].strip()) for a in line["answers"]}
    write(scored, lines)
    rewards = np.array([list(line["rewards"].values()) for line in lines])
    return float(rewards.mean()), float(((0 < rewards.mean(1)) & (rewards.mean(1) < 1)).mean())


def rank(folder: Path, answered: Path) -> Path:
    """Rankings of each request's different answers."""
    scored = folder / "scored.jsonl"
    ranked = folder / "ranked.jsonl"
    right, mixed = verify(answered, scored)
    print(f"{folder}: {right:.3f} of {ANSWERS} answers right, {mixed:.3f} of the requests have right and wrong ones")
    choose = ["--strategy", "best_of_n", "--form", "records", "--number", str(ANSWERS)]
    sample.main([str(scored), *choose, "--out", str(ranked), "--overwrite"])
    return ranked


def sampled(folder: Path, start: Model) -> Path:
    """Rankings of the model's own answers to the training requests."""
    options, checkpoint = start
    train = folder / "train.jsonl"
    drawn = [*options, f"--ckpt_path={checkpoint}", sources("predict", train)]
    predict(folder / "answers", [*drawn, sampling("answers", ANSWERS, 0, LONGEST_ROUTE)], [checkpoint, train])
    return rank(folder, folder / "answers/answers.jsonl")


def trained(folder: Path, method: str, rate: float, seed: int) -> Model:
    """Options and checkpoint of one training that continues the model; that of DPO comes before that of SFT."""
    adapter, own = folder / "sft/run/checkpoints/export", folder / f"seed-{seed}"
    weights = adapter / "adapter_model.safetensors"
    if method == "DPO":
        ranked = folder / "ranked.jsonl"
        some = {"path": str(ranked), "num_samples": min(RANKINGS, len(read(ranked)))}
        options = [*continued(DPO, adapter, rate, seed), *BFLOAT16, f"--data.init_args.train={json.dumps([some])}"]
        return options, fit(own / f"DPO-{rate:.0e}", options, [weights, ranked])
    train = folder / "train.jsonl"
    options = [*continued(SFT, adapter, rate, seed), *BFLOAT16, sources("train", train)]
    steps = steps_of(next(own.glob("DPO-*/run/checkpoints/*.ckpt")))
    options += [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    return options, fit(own / f"SFT-{rate:.0e}", options, [weights, train])


def requests(seeds: list[int], tiny: bool) -> None:
    """Train, answer, and print the tables."""
    folder = DATA / ("requests_tiny" if tiny else "requests")
    choose, held_out = write_requests(folder, *((8, 8) if tiny else (CHOOSE, HELD_OUT)))
    start = begun(folder, tiny)
    sampled(folder, start)
    on_choose = {("SFT", 0.0): answered(folder, "SFT", choose, start).mean()}
    chosen = {}
    for method, rates in RATES.items():
        for rate in rates:
            model = trained(folder, method, rate, seeds[0])
            on_choose[method, rate] = answered(folder, f"{method}-{rate:.0e}-{seeds[0]}", choose, model).mean()
        chosen[method] = max(rates, key=lambda rate: on_choose[method, rate])
    hits = {"SFT": np.stack([answered(folder, "SFT", held_out, start)] * len(seeds))}
    for method, rate in chosen.items():
        hits[method] = np.stack(
            [
                answered(folder, f"{method}-{rate:.0e}-{seed}", held_out, trained(folder, method, rate, seed))
                for seed in seeds
            ]
        )
    print_requests(on_choose, chosen, hits)


def print_requests(
    on_choose: dict[tuple[str, float], float], chosen: dict[str, float], hits: dict[str, Values]
) -> None:
    """Tables of exact match, and of the differences between the learning rates that were chosen.

    Args:
        on_choose: Share of right answers of the first seed on the requests to choose on, by method and learning rate.
        chosen: The learning rate of each method.
        hits: Whether each held-out answer is right, [seeds, requests], by method.
    """
    number = hits["SFT"].shape[1]
    print(f"\n| training | learning rate | to choose on | {number} held out | of each seed |\n|---|---|---|---|---|")
    for (method, rate), share in on_choose.items():
        cells = ["-", "-"]
        if chosen.get(method, 0.0) == rate:
            cells = [f"{hits[method].mean():.3f}", ", ".join(f"{value:.3f}" for value in hits[method].mean(1))]
        print(f"| {method} | {f'{rate:g}' if rate else '-'} | {share:.2f} | {' | '.join(cells)} |")
    pairs = [("DPO", "SFT continued"), *((method, "SFT") for method in RATES)]
    print_differences(f"difference on {number} held out", hits, pairs)


# Lines about films.

FILM = "configs/preference/vader_smollm2.yaml"
ASK = "Finish this line about a film:"
BEGINNING = 4  # words of a line that the prompt gives
LENGTHS = range(8, 31)  # words of a line
LINES = {"pairs": 700, "sft": 600, "prompts": 250, "held_out": 200, "test": 300}
FILM_RATES = (1e-4, 3e-4, 1e-3)
LOSSES = {
    "DPO": ["--model.init_args.reference=cached"],  # once for all learning rates
    "KTO": ['--model.init_args.losses=[{"name": "kto"}]', "--data.init_args.kind=outcomes"],
}
PAIRS = 125  # that one training takes
DRAWN = 1  # answers to each held-out beginning
LONGEST = 56  # tokens of an answer


def write_lines(folder: Path, sizes: dict[str, int]) -> None:
    """Records of all trainings; those of the two reward models share no rating."""
    parts = ratings.split(ratings.snippets())
    halves = {"a": parts["train"][::2], "b": parts["train"][1::2]}
    for name, half in halves.items():
        pairs = list(ratings.pairs(half[: sizes["pairs"]], 0))
        write(folder / f"reward_{name}.jsonl", pairs)
    write(folder / "reward_test.jsonl", list(ratings.pairs(parts["test"][: sizes["test"]], 0)))
    lines = [line for line in halves["a"][sizes["pairs"] :] if len(line[1].split()) in LENGTHS]
    held_out = [line for line in parts["test"] if len(line[1].split()) in LENGTHS]
    end = sizes["sft"] + sizes["prompts"]
    for name, some in (
        ("sft", lines[: sizes["sft"]]),
        ("prompts", lines[sizes["sft"] : end]),
        ("held_out", held_out[: sizes["held_out"]]),
    ):
        write(folder / f"{name}.jsonl", [chat(number, text) for number, text, _ in some])


def chat(number: str, line: str) -> Record:
    """A line as a conversation: its beginning is asked, the whole line is the answer."""
    prompt = f"{ASK} {' '.join(line.split()[:BEGINNING])}"
    return {"id": number, "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": line}]}


def reward_model(folder: Path, name: str) -> Model:
    """Options and checkpoint of a reward model, and its accuracy on pairs of other snippets, printed."""
    train, test = folder / f"reward_{name}.jsonl", folder / "reward_test.jsonl"
    options = [f"--config={REWARD}", *BFLOAT16, sources("train", train), callbacks(LAST), *NO_VALIDATION]
    checkpoint = fit(folder / f"reward_{name}", options, [train])
    target = folder / f"reward_{name}_test"

    def measure() -> None:
        tested = [*options, f"--ckpt_path={checkpoint}", sources("test", test), "--trainer.logger=false"]
        metrics = build(["test", *tested], run=True).trainer.callback_metrics
        write(target / "metrics.json", [{key: float(value) for key, value in metrics.items()}])

    stage(target, options, [checkpoint, test], measure)
    accuracy = read(target / "metrics.json")[0]["test/accuracy"]
    print(f"reward model {name.upper()}: {len(read(train))} pairs, accuracy {accuracy:.3f} on {len(read(test))} others")
    return options, checkpoint


def judge(folder: Path, model: Model, answered: Path) -> Path:
    """Answers with their rewards, behind the question that the reward model knows.

    Returns:
        The lines of the answers with `rewards`, as `lit-alignment sample` reads them.
    """
    options, checkpoint = model
    lines = read(answered)
    question = [{"role": "user", "content": ratings.ASK}]
    asked = write(folder.with_name(f"{folder.name}_asked.jsonl"), [line | {"messages": question} for line in lines])
    predict(folder, [*options, f"--ckpt_path={checkpoint}", sources("predict", asked)], [checkpoint, asked])
    rewards = {line["id"]: line["rewards"] for line in read(folder / "rewards.jsonl")}
    return write(folder / "scored.jsonl", [line | {"rewards": rewards[line["id"]]} for line in lines])


def train_policies(folder: Path, reward: Model, rates: tuple[float, ...]) -> dict[tuple[str, float], Model]:
    """Options and checkpoint of each policy, by method and learning rate.

    Args:
        folder: Of all of them.
        reward: Reward model A.
        rates: Learning rates.
    """
    lines = [sources("train", folder / "sft.jsonl"), callbacks(LAST, EXPORT), *NO_VALIDATION]
    begin = [f"--config={SFT}", *BFLOAT16, *lines]
    start, prompts = fit(folder / "sft", begin, [folder / "sft.jsonl"]), folder / "prompts.jsonl"
    trained = {("SFT", 0.0): (begin, start)}
    asked = [*begin, f"--ckpt_path={start}", sources("predict", prompts), sampling("answers", ANSWERS, 0, LONGEST)]
    predict(folder / "answers", asked, [start, prompts])
    scored, pairs = judge(folder / "answers_a", reward, folder / "answers/answers.jsonl"), folder / "pairs.jsonl"
    sample.main([str(scored), "--strategy=best_of_n", "--form=pairs", f"--out={pairs}", "--overwrite"])
    some = {"path": str(pairs), "num_samples": min(PAIRS, len(read(pairs)))}
    for method, loss in LOSSES.items():
        for rate in rates:
            options = continued(FILM, folder / "sft/run/checkpoints/export", rate, 0)
            options += [*BFLOAT16, *loss, f"--data.init_args.train={json.dumps([some])}"]
            trained[method, rate] = options, fit(folder / f"{method}-{rate:.0e}", options, [start, pairs])
    return trained


def vader(tiny: bool) -> None:
    """Train reward models and policies, judge, and print the table."""
    folder = DATA / ("vader_tiny" if tiny else "vader")
    sizes = dict.fromkeys(LINES, 24) if tiny else LINES
    write_lines(folder, sizes)
    models = {name: reward_model(folder, name) for name in ("a", "b")}
    held_out = folder / "held_out.jsonl"
    trained = train_policies(folder, models["a"], FILM_RATES[:1] if tiny else FILM_RATES)
    start = trained["SFT", 0.0][1]
    found = {}
    for (method, rate), (options, checkpoint) in trained.items():
        own = folder / "held_out" / f"{method}-{rate:.0e}"
        asked = [*options, f"--ckpt_path={checkpoint}", sources("predict", held_out)]
        predict(own / "answers", [*asked, sampling("answers", DRAWN, 1, LONGEST)], [checkpoint, held_out])
        answers = own / "answers/answers.jsonl"
        row = {f"reward_{name}": rewards(judge(own / name, model, answers)) for name, model in models.items()}
        found[method, rate] = row | compare(own / "metrics", answers, checkpoint, start)
    print_lines(found)


def compare(folder: Path, answers: Path, policy: Path, reference: Path) -> Record:
    """Lengths of a policy's answers, how they differ, and how far it has moved: the means of `evaluate`."""
    measured = folder / "means.json"
    options = ["--metrics=length,distinct,kl", f"--model={policy}", f"--base={reference}", f"--json={measured}"]
    stage(folder, options, [policy, reference, answers], lambda: evaluate.main([str(answers), *options]))
    means: Record = json.loads(measured.read_text())
    return next(iter(means.values()))


def rewards(scored: Path) -> Values:
    """The mean reward of each prompt's answers, [prompts]."""
    return np.array([np.mean(list(line["rewards"].values())) for line in read(scored)])


def print_lines(found: dict[tuple[str, float], Record]) -> None:
    """The table of all policies.

    Args:
        found: By method and learning rate: rewards of each prompt under both models, and the means of evaluate.
    """
    base = found["SFT", 0.0]
    print("\n| policy | learning rate | reward by B | less SFT | by A | less SFT | KL, nats a token | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, rate), row in found.items():
        cells = [method, f"{rate:g}" if rate else "-"]
        for name in ("reward_b", "reward_a"):
            mean, low, high = interval((row[name] - base[name])[None])
            cells += [f"{row[name].mean():.2f}", f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if rate else "-"]
        print(f"| {' | '.join(cells)} | {row['kl']:.3f} | {row['length_tokens']:.1f} |")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["requests", "vader"])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of requests; the first one's choose rates")
    parser.add_argument("--tiny", action="store_true", help="a handful of records, to see every stage run")
    options = parser.parse_args()
    begin = time.perf_counter()
    fetch(MODEL)
    if options.what == "requests":
        requests(options.seeds, options.tiny)
    else:
        vader(options.tiny)
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
