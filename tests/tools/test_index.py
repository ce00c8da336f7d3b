"""`lit-alignment index`: build and eval as a user runs them, with trained weights, and on two ranks."""

import json

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import RetrieverDataModule, RetrieverModule
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.models.dual_encoder import load_retriever, weights_hash
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.retrieval.index import PassageIndex
from lit_alignment.tools import index
from tests.helpers import RETRIEVER, ROOT, base_model_folder, chats, trainer, write_jsonl
from tests.helpers.commands import command
from tests.helpers.ranks import run_on_ranks

PASSAGES = [{"id": f"n{i}", "title": f"note {i}", "text": chats(9)[i]["messages"][0]["content"]} for i in range(9)]


@pytest.fixture
def config(tmp_path):
    """A RAG configuration over nine passages."""
    found = yaml.safe_load((ROOT / "configs/rag/tiny.yaml").read_text())
    found["model"]["init_args"]["backbone"] = {"path": base_model_folder(tmp_path / "base")}
    passages = [{"path": write_jsonl(tmp_path / "passages.jsonl", PASSAGES)}]
    found["model"]["init_args"]["index"] = {"path": str(tmp_path / "index"), "passages": passages}
    path = tmp_path / "rag.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def test_index_holds_the_passages_in_order_with_their_vectors(config, tmp_path, capsys):
    before = set(ROOT.iterdir())
    index.main(["build", "--config", str(config), "--model.index.batch_size=2"])
    assert set(ROOT.iterdir()) == before  # nothing of it stays in the working folder
    assert "9 passages, vectors of 64 numbers in float32, exact search" in capsys.readouterr().out
    made = PassageIndex.load(tmp_path / "index")
    assert [passage.id for passage in made.at(torch.arange(9))] == [passage["id"] for passage in PASSAGES]
    with torch.no_grad():
        expected = load_retriever(RETRIEVER).passages([f"{p['title']} {p['text']}" for p in PASSAGES])
    torch.testing.assert_close(made.shards[0], expected, rtol=1e-4, atol=1e-6)


def test_eval_finds_a_passage_by_its_own_words(config, tmp_path, capsys):
    index.main(["build", "--config", str(config)])
    queries = [{"query": f"{p['title']} {p['text']}", "relevant": [p["id"]]} for p in PASSAGES]
    asked = write_jsonl(tmp_path / "queries.jsonl", queries)
    out = tmp_path / "metrics.json"
    index.main(["eval", "--config", str(config), "--queries", asked, "--k", "1,3", "--json", str(out)])
    assert json.loads(out.read_text()) == pytest.approx({"recall@1": 1, "recall@3": 1, "mrr": 1, "ndcg@3": 1})
    assert "9 questions, 9 passages\n" in capsys.readouterr().out
    records = [{"prompt": p["query"], "completion": "so", "relevant": p["relevant"]} for p in queries]
    asked = write_jsonl(tmp_path / "records.jsonl", records)  # those that a RAG module trains on
    index.main(["eval", "--config", str(config), "--queries", asked, "--k", "1", "--json", str(out)])
    assert json.loads(out.read_text())["recall@1"] == 1


def test_folder_of_text_is_cut_and_counted(config, tmp_path, capsys):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    (notes / "a.md").write_text("# Setup\n\nUnpack it.\n\n## Linux\n\nRun make.\n")
    (notes / "b.txt").write_text("word " * 500)
    settings = ["--model.index.passages", json.dumps([{"path": str(notes)}])]
    index.main(["build", "--config", str(config), *settings, "--model.retriever.passage_max_length=60"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'index'}: 7 passages, vectors" in said
    assert f"\n  {notes}: 2 files of text; skipped: 1 hidden\n" in said
    assert "5 passages are longer than retriever.passage_max_length (60 tokens), and lose their ends." in said
    made = PassageIndex.load(tmp_path / "index").at(torch.arange(7))
    assert [(each.id, each.title) for each in made[:3]] == [
        ("a.md#1", "a.md: Setup"),
        ("a.md#2", "a.md: Setup > Linux"),
        ("b.txt#1", "b.txt"),
    ]
    assert made[6].text == " ".join(["word"] * 100)


def test_files_of_one_name_in_two_folders_need_names_of_their_folders(config, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(f"text of {name}")
    sources = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    build = ["build", "--config", str(config), "--model.index.passages"]
    with pytest.raises(ConfigError, match="the id 'a.md#1' is that of two passages.* a 'name' of its own"):
        index.main([*build, json.dumps(sources)])
    assert not (tmp_path / "index").exists() and not (tmp_path / ".index.partial").exists()
    index.main([*build, json.dumps([source | {"name": source["path"][-3:]} for source in sources])])
    assert PassageIndex.load(tmp_path / "index").passages["id"] == ["one/a.md#1", "two/a.md#1"]


@pytest.mark.slow
def test_index_that_is_there_is_not_overwritten_unasked(config, tmp_path):
    index.main(["build", "--config", str(config)])
    with pytest.raises(ConfigError, match="exists. Choose another"):
        index.main(["build", "--config", str(config)])
    index.main(["build", "--config", str(config), "--overwrite"])


@pytest.mark.slow
def test_two_processes_build_the_same_index(config, tmp_path):
    index.main(["build", "--config", str(config)])
    one = PassageIndex.load(tmp_path / "index")
    two = tmp_path / "two"
    settings = [f"--model.index.path={two}", "--model.index.batch_size=2", "--trainer.devices=2"]
    run_on_ranks(index.main, ["build", "--config", str(config), *settings])
    made = PassageIndex.load(two)
    assert made.manifest.encoder_hash == one.manifest.encoder_hash and made.passages["id"] == one.passages["id"]
    torch.testing.assert_close(made.shards[0], one.shards[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "query, message",
    [
        ({"relevant": ["n1"]}, "queries.jsonl:1: field 'query' is null"),
        ({"query": "x", "relevant": []}, "queries.jsonl:1: field 'relevant' is a list"),
        ({"query": "x", "relevant": ["m1"]}, "names 'm1', which is not in the index"),
    ],
)
def test_bad_question_is_named(config, query, message, tmp_path):
    index.main(["build", "--config", str(config)])
    asked = write_jsonl(tmp_path / "queries.jsonl", [query])
    with pytest.raises(RecordError, match=message):
        index.main(["eval", "--config", str(config), "--queries", asked])


def test_mistakes_are_one_message_with_exit_code_2(config, tmp_path):
    write_jsonl(tmp_path / "passages.jsonl", [*PASSAGES, {"title": "x", "text": ""}])
    run = command("index", "build", "--config", str(config))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"{tmp_path}/passages.jsonl:10: field 'text' is empty" in run.stderr
    run = command("index", "eval", "--config", str(config), "--queries", "nothing.jsonl")
    assert run.returncode == 2 and "no index here" in run.stderr


def test_index_is_made_with_the_trained_weights_of_the_checkpoint(config, tmp_path):
    records = [{"query": f"question {i}", "positive": f"passage {i}"} for i in range(4)]
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    module = RetrieverModule(RETRIEVER, optimizer=optimizer)
    data = RetrieverDataModule(module.tokenizer, train=[SourceConfig(records=records, name="q")], packing=False)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="trained")
    trainer(tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=2).fit(module, data)
    index.main(["build", "--config", str(config), "--ckpt_path", str(tmp_path / "ckpt/trained.ckpt")])
    made = PassageIndex.load(tmp_path / "index")
    assert made.manifest.encoder_hash == weights_hash(module.network.passage_tower)
    texts = [f"{p['title']} {p['text']}" for p in PASSAGES]
    with torch.no_grad():
        expected, untrained = module.network.passages(texts), load_retriever(RETRIEVER).passages(texts)
    torch.testing.assert_close(made.shards[0], expected, rtol=1e-4, atol=1e-6)
    assert float((expected - untrained).abs().max()) > 1e-2
