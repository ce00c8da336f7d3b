"""Configurations that `init` writes are valid, fit the data they are given, and bring along what they name."""

import json
import re

import pytest
import yaml

from lit_alignment.models.adapters import save_adapter
from lit_alignment.paths import recipes_dir
from lit_alignment.tools.init.recipes import recipe_names
from lit_alignment.tools.init.templates import METHODS
from lit_alignment.trainer_cli import AlignmentCLI, build
from tests.helpers import base_model_folder, chats, classifier, judged, labelled, pairs, reward_model, write_jsonl
from tests.helpers.adapters import PROMPTS, WEIGHTS, module_with
from tests.helpers.commands import command


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """A user's folder, outside of any checkout."""
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


def written(method, *options):
    result = command("init", method, *options)
    assert result.returncode == 0, result.stderr
    with open(f"{method}.yaml") as file:
        return result.stdout, yaml.safe_load(file)


@pytest.mark.parametrize("model", ["tiny", "some/model"])
@pytest.mark.parametrize("method", METHODS)
def test_configuration_of_each_method_is_valid_and_names_what_is_there(method, model, monkeypatch, empty_folder):
    monkeypatch.setattr(AlignmentCLI, "instantiate_classes", lambda self: None)
    said, config = written(method, "--model", model)
    settings = build(["--config", f"{method}.yaml"]).config
    assert settings.model.class_path.removesuffix("Module") == settings.data.class_path.removesuffix("DataModule")
    assert config["model"]["init_args"]["backbone"]["path"] == ("sample_model/tiny" if model == "tiny" else model)
    assert ("peft" in config["model"]["init_args"]) == (model != "tiny")
    for name in re.findall(r"sample_\w+/[\w./-]+", (empty_folder / f"{method}.yaml").read_text()):
        assert (empty_folder / name).exists(), name
    commands = re.findall(r"^  lit-alignment (.*)", said, re.M)
    assert [each.split()[0] for each in commands if "fetch" not in each][-2:] == ["fit", "predict"]
    savers = [each for each in config["trainer"]["callbacks"] if "Checkpoint" in each["class_path"]]
    stopper = next(each for each in config["trainer"]["callbacks"] if "EarlyStopping" in each["class_path"])
    assert "monitor" not in savers[0]["init_args"]
    assert savers[1]["init_args"]["monitor"] == stopper["init_args"]["monitor"]


def test_some_records_are_held_out_for_validation_unless_they_are_given(tmp_path):
    path = write_jsonl(tmp_path / "my chats.jsonl", chats(35))
    data = written("sft", "--data", path)[1]["data"]["init_args"]
    assert data["train"] == [{"path": path}] and data["val_fraction"] == 0.1 and "val" not in data
    text = (tmp_path / "user/sft.yaml").read_text()
    assert re.search(
        r"most of these records are trained on too\. To measure, .*\n    predict: .*num_rows: 20}\]\n", text
    )
    assert "without it some of --data, drawn at random" in " ".join(command("init", "--help").stdout.split())
    (tmp_path / "user/sft.yaml").unlink()
    val = write_jsonl(tmp_path / "val.jsonl", [{"question": "why", "answer": "so"}])
    data = written("sft", "--data", path, "--val", val)[1]["data"]["init_args"]
    assert data["train"] == [{"path": path}]
    assert data["val"] == [{"path": val, "columns": {"prompt": "question", "completion": "answer"}}]
    assert "val_fraction" not in data


@pytest.mark.parametrize(
    "method, val, said",
    [
        ("sft", pairs(2), r"val.jsonl:1: field 'messages' is missing .* it fits lit-alignment init reward or"),
        ("sft", [], "val.jsonl: no record. Give a file of records"),
        ("sft", None, "val.jsonl: no such file"),
        ("classification", [{"text": "x", "label": 0.5}], "the records hold a score, and those of --data one label"),
        ("preference", judged(2), "hold one response, judged alone, and those of --data responses to compare. Make"),
    ],
)
def test_records_that_validate_are_looked_at_as_those_that_are_trained(method, val, said, tmp_path, empty_folder):
    records = {"sft": chats, "classification": labelled, "preference": pairs}[method](12)
    data, given = write_jsonl(tmp_path / "data.jsonl", records), str(tmp_path / "val.jsonl")
    if val is not None:
        write_jsonl(tmp_path / "val.jsonl", val)
    result = command("init", method, "--data", data, "--val", given)
    assert result.returncode == 2 and re.search(said, result.stderr), result.stderr
    assert not list(empty_folder.iterdir())


def test_classes_are_those_of_training_and_of_validation(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", labelled(12))
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": "x", "label": "rare"}])
    model = written("classification", "--data", data, "--val", val)[1]["model"]
    assert model["init_args"]["labels"] == ["bad", "fine", "good", "rare"]


def test_passages_are_looked_at(tmp_path, empty_folder):
    data, passages = write_jsonl(tmp_path / "data.jsonl", chats(12)), str(tmp_path / "passages.jsonl")
    for records, said in (([{"title": "x"}], "passages.jsonl:1: field 'text' is missing"), ([], "jsonl: no passage")):
        write_jsonl(tmp_path / "passages.jsonl", records)
        result = command("init", "rag", "--data", data, "--passages", passages)
        assert result.returncode == 2 and said in result.stderr and not list(empty_folder.iterdir()), result.stderr


def test_passages_may_be_a_folder_of_text(tmp_path, empty_folder):
    notes = tmp_path / "notes"
    notes.mkdir()
    data = write_jsonl(tmp_path / "data.jsonl", chats(12))
    asked = ("init", "rag", "--data", data, "--passages", str(notes))
    refused = command(*asked)
    assert refused.returncode == 2 and f"{notes}: 0 files of text. Give a folder with" in refused.stderr
    assert not list(empty_folder.iterdir())
    (notes / "a.md").write_text("# Setup\n\nUnpack it.\n")
    (notes / "b.pdf").write_text("")
    said, config = written(*asked[1:])
    assert "\npassages: 1 file of text; skipped: 1 of other kinds (.pdf 1)\n" in said
    assert config["model"]["init_args"]["index"]["passages"] == [{"path": str(notes)}]


def test_labels_and_judged_responses_are_found_in_the_data(tmp_path, empty_folder):
    model = written("classification", "--data", write_jsonl(tmp_path / "a.jsonl", labelled(12)))[1]["model"]
    assert model["init_args"]["labels"] == ["bad", "fine", "good"]
    assert model["init_args"]["problem"] == "single_label"
    (empty_folder / "classification.yaml").unlink()
    several = [record | {"label": ["no", record["label"]]} for record in labelled(12)]
    model = written("classification", "--data", write_jsonl(tmp_path / "b.jsonl", several))[1]["model"]
    assert model["init_args"]["labels"] == ["bad", "fine", "good", "no"]  # a text, which YAML alone would read as false
    assert model["init_args"]["problem"] == "multi_label"
    config = written("preference", "--data", write_jsonl(tmp_path / "c.jsonl", judged(12)))[1]
    assert config["data"]["init_args"]["kind"] == "outcomes"
    assert config["model"]["init_args"]["losses"] == [{"name": "kto", "beta": 0.1}]


@pytest.mark.parametrize(
    "method, record, columns",
    [
        ("sft", {"question": "why", "answer": "so"}, {"prompt": "question", "completion": "answer"}),
        ("policy", {"query": "why", "response": "so"}, {"prompt": "query", "label": "response"}),
        ("classification", {"review": "fine", "stars": 4}, {"text": "review", "label": "stars"}),
        (
            "preference",
            {"question": "why", "better": "so", "worse": "no"},
            {"prompt": "question", "chosen": "better", "rejected": "worse"},
        ),
        ("classification", {"text": "fine", "label": "yes"}, None),
    ],
)
def test_columns_of_usual_names_are_found(method, record, columns, tmp_path):
    config = written(method, "--data", write_jsonl(tmp_path / "data.jsonl", [record] * 12))[1]
    (source,) = config["data"]["init_args"]["train"]
    assert source.get("columns") == columns and config["data"]["init_args"]["predict"][0].get("columns") == columns


def test_columns_of_other_names_are_asked_for_and_may_be_given(tmp_path):
    """Of a spreadsheet's export: a BOM, semicolons, Windows line ends, an umlaut in a name and a column without one."""
    path = tmp_path / "reviews.csv"
    rows = [f'{number};"Käse ""gut""\r\nund günstig";{number % 5 + 1};' for number in range(30)]
    path.write_bytes("\r\n".join(["ID;Bewertung für uns;Sterne;", *rows]).encode("utf-8-sig"))
    refused = command("init", "classification", "--data", str(path))
    assert refused.returncode == 2 and re.search(
        r"csv:2: no columns of usual names for 'text' and 'label' \(there are: 'ID', 'Bewertung für uns', 'Sterne'\)\. "
        r"Say which hold them: --columns text=COLUMN label=COLUMN",
        refused.stderr,
    )
    columns = {"text": "Bewertung für uns", "label": "Sterne"}
    given = [f"{name}={column}" for name, column in columns.items()]
    config = written("classification", "--data", str(path), "--columns", *given)[1]
    assert config["data"]["init_args"]["train"] == [{"path": str(path), "columns": columns}]
    assert config["model"]["init_args"]["labels"] == ["1", "2", "3", "4", "5"]
    said = command("init", "sft", "--data", str(path), "--columns", "prompt=Bewertung", "completion=Sterne").stderr
    assert "no column is named 'Bewertung'" in said and "Did you mean 'Bewertung für uns'?" in said


@pytest.mark.parametrize(
    "method, record, columns, said",
    [
        (
            "preference",
            {"Frage": "why", "gut": "so", "schlecht": "no"},
            [],
            r":1: no columns of usual names for 'prompt', 'chosen' and 'rejected' \(there are: 'Frage', 'gut', "
            r"'schlecht'\)\. .*: --columns prompt=COLUMN chosen=COLUMN rejected=COLUMN; of responses judged",
        ),
        ("preference", {"Frage": "why", "b": "so"}, [], r"'chosen' and 'rejected' \(there are: 'Frage', 'b'\)"),
        (
            "reward",
            {"question": "why", "gut": "so", "rejected": "no"},
            [],
            r"--columns prompt=COLUMN chosen=COLUMN rejected=rejected$",
        ),
        (
            "sft",
            {"Frage": "why", "Die Antwort": "so"},
            ["question=Frage", "answer=Die Antwort"],
            r":1: --columns names 'question' and 'answer', and sft reads 'prompt' and 'completion'\. "
            r"Write --columns prompt=Frage 'completion=Die Antwort'$",
        ),
        ("sft", {"Frage": "why", "b": "so"}, ["prompt=Frage", "reply=b"], r"--columns prompt=Frage completion=COLUMN$"),
        (
            "preference",
            {"Frage": "why", "b": "so"},
            ["prompt=Frage", "completion=b"],
            r"field 'label' is missing\. Give 'chosen' and 'rejected'",
        ),
        ("sft", {"Frage": "why"}, ["messages=Frage"], r"field 'messages' is a string"),
    ],
)
def test_fields_that_columns_may_name_are_said(method, record, columns, said, tmp_path, empty_folder):
    data = write_jsonl(tmp_path / "data.jsonl", [record] * 12)
    result = command("init", method, "--data", data, *(["--columns", *columns] if columns else []))
    assert result.returncode == 2 and re.search(said, result.stderr.strip()), result.stderr
    assert not list(empty_folder.iterdir())


def test_columns_may_stand_before_the_method_and_more_than_once(tmp_path, empty_folder):
    path = write_jsonl(tmp_path / "data.jsonl", [{"ask": "why", "say": "so"}] * 12)
    for words in ("--columns prompt=ask completion=say sft", "--columns prompt=ask --columns completion=say sft"):
        assert command("init", "--data", path, *words.split()).returncode == 0
        config = yaml.safe_load((empty_folder / "sft.yaml").read_text())
        assert config["data"]["init_args"]["train"][0]["columns"] == {"prompt": "ask", "completion": "say"}
        (empty_folder / "sft.yaml").unlink()
    said = command("init", "sft", "--data", path, "--columns", "a=b", "reward").stderr
    assert "--columns reward: write FIELD=COLUMN" in said


def test_numbers_are_a_regression(tmp_path):
    records = [{"text": "fine", "label": 0.5 + number} for number in range(12)]
    model = written("classification", "--data", write_jsonl(tmp_path / "data.jsonl", records))[1]["model"]
    assert (model["init_args"]["labels"], model["init_args"]["problem"]) == (["score"], "regression")


@pytest.mark.parametrize(
    "method, records, said",
    [
        (
            "sft",
            pairs(12),
            r"data.jsonl:1: field 'messages' is missing .* it fits lit-alignment init reward or preference",
        ),
        ("reward", judged(12), "has one response alone.* it fits lit-alignment init preference or"),
        ("classification", chats(12), "field 'label' is missing.* it fits lit-alignment init sft or"),
        ("vlm", chats(12), "field 'images' is missing.* it fits lit-alignment init sft or"),
        ("sft", [*chats(3), {"messages": "hello"}], "data.jsonl:4: field 'messages' is a string"),
        ("sft", [{"text": "hello"}] * 20, "data.jsonl:1: field 'messages' is missing"),
        ("sft", chats(3), "3 records are too few to hold some out for validation. Give --val"),
    ],
)
def test_records_that_do_not_fit_are_one_message_and_nothing_is_written(method, records, said, tmp_path, empty_folder):
    result = command("init", method, "--data", write_jsonl(tmp_path / "data.jsonl", records))
    assert result.returncode == 2 and re.search(said, result.stderr), result.stderr
    assert not list(empty_folder.iterdir())


def test_what_is_there_already_is_not_replaced(empty_folder):
    (empty_folder / "sft.yaml").write_text("mine")
    result = command("init", "sft")
    assert result.returncode == 2 and "sft.yaml is there already. Give another name with --out" in result.stderr
    (empty_folder / "configs/sft").mkdir(parents=True)
    (empty_folder / "configs/sft/tiny.yaml").write_text("mine")
    result = command("init", "--recipe", "sft/tiny")
    assert result.returncode == 2 and "configs/sft/tiny.yaml is there already, with other content" in result.stderr
    assert command("init", "sft", "--out", "other.yaml").returncode == 0
    assert (empty_folder / "sft.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_brings_along_all_that_it_names(name, empty_folder):
    assert command("init", "--recipe", name).returncode == 0
    assert (empty_folder / f"configs/{name}.yaml").read_bytes() == (recipes_dir() / f"{name}.yaml").read_bytes()
    for file in empty_folder.rglob("*.yaml"):
        for named in re.findall(r"configs/[\w/-]+(?:\.\w+)?", file.read_text()):
            assert (empty_folder / named).exists(), (file, named)
    for file in empty_folder.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            for image in re.findall(r'"image": "(.*?)"', line):
                assert (file.parent / image).exists()


def test_recipes_are_listed_and_found_by_their_last_name():
    listed = command("init", "--list").stdout
    assert all(f"  {name} " in listed for name in recipe_names()) and "  LoRA on a real chat model\n" in listed
    assert command("init", "--recipe", "smollm2_lora").returncode == 0
    result = command("init", "--recipe", "tiny")
    assert result.returncode == 2 and "more than one: classification/tiny, distillation/tiny" in result.stderr
    assert "of this name there is none" in command("init", "--recipe", "sft/tinny").stderr


def test_purpose_of_a_recipe_is_a_whole_sentence():
    assert re.search(r"adamw_8bit .*\(Dettmers et al\. \d{4}.*\)", command("init", "--list").stdout)


def test_recipe_that_is_not_here_is_offered():
    result = command("fit", "--config", "configs/sft/tiny.yaml")
    assert result.returncode == 2 and "lit-alignment init --recipe sft/tiny writes it" in result.stderr


def test_options_that_do_not_go_together_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", chats(20))
    assert "give a method (sft, " in command("init").stderr
    assert "rag needs both --data FILE and --passages PATH" in command("init", "rag", "--data", path).stderr
    assert "--passages is read by rag" in command("init", "sft", "--passages", path).stderr
    assert "one of them" in command("init", "sft", "--recipe", "sft/tiny").stderr
    assert "--val needs --data" in command("init", "sft", "--val", path).stderr
    assert "--columns needs --data" in command("init", "sft", "--columns", "prompt=a").stderr
    assert "write FIELD=COLUMN" in command("init", "sft", "--data", path, "--columns", "prompt").stderr


def exported_adapter(module, folder):
    """What a run leaves as its export: an adapter with its tokenizer, and a classifier's with its labels."""
    network = module.load_model()
    save_adapter(network, folder)
    module.tokenizer.save_pretrained(folder)
    base = network.get_base_model()
    if base.get_output_embeddings() is None:
        base.config.architectures = [type(base).__name__]
        base.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["sft", "preference", "policy", "distillation"])
def test_adapter_is_trained_further_over_its_base(method, tmp_path, monkeypatch):
    base = base_model_folder(tmp_path / "base")
    adapter = exported_adapter(module_with(base, WEIGHTS["lora"]), tmp_path / "export")
    model = written(method, "--model", adapter)[1]["model"]["init_args"]
    assert model["backbone"] == {"path": base, "tokenizer": adapter} and "peft" not in model
    assert model["adapter"] == {"path": adapter, "trainable": True}
    if method == "distillation":  # its teacher is a model of the hub
        return
    network = build(["--config", f"{method}.yaml"]).model.load_model()
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_adapter_of_a_classifier_is_trained_further_on_the_same_classes(tmp_path, empty_folder):
    base = base_model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", labelled(12))
    module = classifier(base, lora=True, labels=["bad", "fine", "good"])
    adapter = exported_adapter(module, tmp_path / "classifier")
    model = written("classification", "--data", data, "--model", adapter)[1]["model"]["init_args"]
    assert model["adapter"] == {"path": adapter, "trainable": True}
    network = build(["--config", "classification.yaml"]).model.load_model()
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained) and any("lora_" in name for name in trained)


def test_adapter_that_a_method_cannot_train_further_is_refused(tmp_path, empty_folder):
    base = base_model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", labelled(12))
    text = exported_adapter(module_with(base, WEIGHTS["lora"]), tmp_path / "text")
    virtual = exported_adapter(module_with(base, PROMPTS["prompt"]), tmp_path / "virtual")
    reward = exported_adapter(reward_model(base, lora=True), tmp_path / "reward")
    baseless = exported_adapter(module_with(base, WEIGHTS["lora"]), tmp_path / "baseless")
    config = tmp_path / "baseless/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    start = f"Start from its base: --model {base}."
    for words, said in (
        (("classification", "--data", data, "--model", text), f"lit-alignment merge {text} --out FOLDER, then --model"),
        (("classification", "--data", data, "--model", reward), f"that scores reward, and classification .* {start}"),
        (("preference", "--model", reward), f"that scores reward, and preference needs one that writes text. {start}"),
        (("sft", "--model", virtual), "an adapter of virtual tokens"),
        (("sft", "--model", baseless), "baseless/adapter_config.json: base_model_name_or_path is missing"),
    ):
        result = command("init", *words)
        assert result.returncode == 2 and re.search(said, result.stderr), result.stderr
        assert not list(empty_folder.glob("*.yaml"))


def test_classes_that_are_numbers_stand_in_their_order(tmp_path, empty_folder):
    records = [{"messages": [{"role": "user", "content": "q"}], "label": label} for label in (10, 2, 1, 2, 10, 1) * 4]
    model = written("classification", "--data", write_jsonl(tmp_path / "stars.jsonl", records))[1]["model"]
    assert model["init_args"]["labels"] == ["1", "2", "10"]
