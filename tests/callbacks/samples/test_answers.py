import csv
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy

from lit_alignment import CherryPicks, FSDP2Strategy, Throughput
from lit_alignment.callbacks.samples.loggers import log_table, markdown_table
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.evaluation.answers import Answered, Perplexity
from lit_alignment.generation.settings import DecodingConfig
from tests.helpers import chats, sft_data, sft_module, trainer
from tests.helpers.ranks import run_on_ranks

SHORT = DecodingConfig(max_new_tokens=5)


def fit(folder, callback, **options):
    module = sft_module()
    logger = TensorBoardLogger(folder, name="tb")
    runner = trainer(folder, callbacks=[callback, *options.pop("more", [])], logger=logger, max_epochs=2, **options)
    runner.fit(module, sft_data(module, chats(6), chats(5, seed=1)))
    return runner


def test_same_prompts_are_answered_before_and_at_each_validation(tmp_path):
    callback = CherryPicks(num_samples=2, generation=DecodingConfig(max_new_tokens=5))
    runner = fit(tmp_path, callback)
    lines = [json.loads(line) for line in open(f"{runner.log_dir}/cherry_picks.jsonl")]
    steps = sorted({line["step"] for line in lines})
    assert len(steps) == 3 and steps[0] == 0
    for step in steps:
        assert [line["id"] for line in lines if line["step"] == step] == ["r0", "r1"]
    assert lines[0]["reference"] == chats(5, seed=1)[0]["messages"][-1]["content"]
    page = open(f"{runner.log_dir}/report.html").read()
    assert all(f"<b>step {step}</b>" in page for step in steps) and "val/loss" in page


def test_table_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = fit(tmp_path, CherryPicks(num_samples=1, generation=DecodingConfig(max_new_tokens=3)))
    events = EventAccumulator(runner.log_dir)
    events.Reload()
    entries = events.Tensors("cherry_picks/text_summary")
    assert len(entries) == 3 and b"| prompt | reference | answer |" in entries[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_table_reaches_wandb_offline(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p")
    log_table([logger], "cherry_picks", ["prompt", "answer"], [["q", "a"]], 1)
    logger.experiment.finish()
    stored = [json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")]
    assert {"columns": ["prompt", "answer"], "data": [["q", "a"]]}.items() <= stored[0].items()


def test_report_goes_on_after_a_resume(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    fit(tmp_path, CherryPicks(num_samples=1, generation=SHORT), more=[saver], enable_checkpointing=True)
    callback = CherryPicks(num_samples=1, generation=SHORT)
    module = sft_module()
    runner = trainer(tmp_path, callbacks=[callback], max_epochs=3)
    runner.fit(module, sft_data(module, chats(6), chats(5, seed=1)), ckpt_path=tmp_path / "ckpt/x.ckpt")
    assert len(callback.picks[0].answers) == 4 and len(callback.curves["val/loss"]) == 3


def test_resume_with_other_prompts_starts_a_new_table(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="x")
    fit(tmp_path, CherryPicks(num_samples=1, generation=SHORT), more=[saver], enable_checkpointing=True)
    callback = CherryPicks(num_samples=3, generation=SHORT)
    module = sft_module()
    runner = trainer(tmp_path, callbacks=[callback], max_epochs=3)
    runner.fit(module, sft_data(module, chats(6), chats(5, seed=1)), ckpt_path=tmp_path / "ckpt/x.ckpt")
    assert [len(pick.answers) for pick in callback.picks] == [1, 1, 1]


def test_own_prompts_and_missing_prompts(tmp_path):
    source = SourceConfig(records=[{"messages": [{"role": "user", "content": "mine"}]}], name="own")
    own = CherryPicks([source], generation=SHORT)
    fit(tmp_path, own)
    assert own.picks[0].messages[-1]["content"] == "mine" and own.picks[0].known == {"reference": None}
    module = sft_module()
    with pytest.raises(ConfigError, match="CherryPicks has no prompts"):
        trainer(tmp_path, callbacks=[CherryPicks()]).fit(module, sft_data(module, chats(2)))


def test_markdown_cells_keep_to_one_line():
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y<br>z |"


def test_throughput_counts_tokens_and_padding(tmp_path):
    callback = Throughput(every_n_steps=1)
    module = sft_module()
    runner = trainer(tmp_path, callbacks=[callback])
    data = sft_data(module, chats(9), packing=False, batch_size=3)
    runner.fit(module, data)
    assert callback.total_tokens == data.reports["train"].tokens
    metrics = runner.callback_metrics
    assert 0 < float(metrics["train/padding_share"]) < 1
    assert 0 < float(metrics["train/trained_tokens_per_second"]) < float(metrics["train/tokens_per_second"])
    assert 0.1 < float(metrics["train/peak_memory_gib"]) < 64
    packed = trainer(tmp_path, callbacks=[Throughput(every_n_steps=1)])
    packed.fit(sft_module(), sft_data(module, chats(9)))
    assert float(packed.callback_metrics["train/padding_share"]) == 0


def test_metrics_of_the_answers_reach_loggers_table_and_report(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    generation = DecodingConfig(max_new_tokens=5, temperature=1.0, num_return_sequences=3)
    names = ["exact_match", "length", "self_bleu", "perplexity"]
    runner = fit(tmp_path, CherryPicks(num_samples=2, generation=generation, metrics=names))
    events = EventAccumulator(runner.log_dir)
    events.Reload()
    for name in ("exact_match", "length_tokens", "self_bleu", "perplexity"):
        points = events.Scalars(f"cherry_picks/{name}")
        assert len(points) == 3 and points[0].step == 0
    assert events.Scalars("cherry_picks/perplexity")[0].value > 100  # a random model over 768 tokens
    lines = [json.loads(line) for line in open(f"{runner.log_dir}/cherry_picks.jsonl")]
    assert {"exact_match", "length_words", "self_bleu"} <= set(lines[0]["scores"])
    page = open(f"{runner.log_dir}/report.html").read()
    assert "self_bleu, mean" in page and "perplexity, mean" in page


def test_impossible_metric_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="unknown metric 'exact'. Did you mean 'exact_match'"):
        CherryPicks(metrics=["exact"])
    callback = CherryPicks(metrics=["kl"], before_training=False)
    with pytest.raises(ConfigError, match="kl needs the base model"):
        fit(tmp_path, callback)
    assert callback.picks == [] and callback.curves == {}
    asked = {"id": "q", "messages": [{"role": "user", "content": "mine"}], "meta": {"documents": "one text"}}
    callback = CherryPicks([SourceConfig(records=[asked], name="own")], metrics=["retrieval_utility"])
    with pytest.raises(RecordError, match="own, record q: field 'documents' is a string"):
        fit(tmp_path, callback)


def pick_on_ranks(kind, folder):
    """Train one epoch with picks; then gather a metric of which each rank has a part."""
    strategies = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": FSDP2Strategy(process_group_backend="gloo"),
    }
    generation = DecodingConfig(max_new_tokens=4)
    callback = CherryPicks(num_samples=2, generation=generation, metrics=["length", "perplexity", "kl"])
    logger = CSVLogger(folder, name="", version="")
    runner = trainer(folder, strategy=strategies[kind], devices=2, callbacks=[callback], logger=logger)
    module = sft_module(lora=True)
    runner.fit(module, sft_data(module, chats(4), chats(3, seed=1)))
    metric = Perplexity()
    metric.update(Answered(["a"], logps=[[-1.0] if runner.global_rank == 0 else [-4.0, -4.0]]))
    keep = {"scores": [pick.scores for pick in callback.picks], "gathered": metric.compute(), "own": metric.means()}
    torch.save(keep, folder / f"{runner.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_score_the_same_answers_and_gather_what_each_has(kind, tmp_path):
    run_on_ranks(pick_on_ranks, kind, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["scores"] == second["scores"] and len(first["scores"][0]) == 2  # before, and after an epoch
    assert first["scores"][0][0]["kl"] == pytest.approx(0, abs=1e-6)
    # Three tokens: -1, -4 and -4.
    assert first["gathered"] == second["gathered"] == pytest.approx({"perplexity": math.exp(3)})
    assert first["own"] == pytest.approx({"perplexity": math.e})
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row["cherry_picks/length_tokens"] for row in csv.DictReader(file)]
    assert len([value for value in logged if value]) == 2


def test_means_are_those_of_each_validation_alone(tmp_path):
    """Of two prompts, none is answered as the reference has it before training, then one, then both."""
    module = sft_module()
    logger = CSVLogger(tmp_path, name="csv")
    callback = CherryPicks(num_samples=2, generation=SHORT, metrics=["exact_match"])
    respond = module.respond

    def answered(items, settings):
        right = runner.current_epoch + 1 if runner.global_step else 0
        texts = [f" {item.reference}\n" if place < right else "other" for place, item in enumerate(items)]
        responses = zip(respond(items, settings), texts, strict=True)
        return [replace(each, completions=[replace(each.completions[0], text=text)]) for each, text in responses]

    module.respond = answered
    runner = trainer(tmp_path, callbacks=[callback], logger=logger, max_epochs=2)
    runner.fit(module, sft_data(module, chats(6), chats(5, seed=1)))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [row["cherry_picks/exact_match"] for row in csv.DictReader(file)]
    assert [float(value) for value in logged if value] == [0.0, 0.5, 1.0]
    lines = [json.loads(line) for line in open(f"{logger.log_dir}/cherry_picks.jsonl")]
    assert [line["scores"]["exact_match"] for line in lines] == [0, 0, 1, 0, 1, 1]
    page = open(f"{logger.log_dir}/report.html").read()
    assert re.findall("([0-9]) of 2<", page) == ["0", "1", "2"]
