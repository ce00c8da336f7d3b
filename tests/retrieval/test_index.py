"""Indexes on disk: what is written is what is read, and what does not fit is refused."""

import json

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from lit_alignment.errors import ConfigError
from lit_alignment.retrieval.index import IndexConfig, PassageIndex
from tests.helpers import knowledge_index


@pytest.fixture
def embeddings():
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read_again_over_shards(dtype, embeddings, tmp_path):
    folder = knowledge_index(IndexConfig(str(tmp_path / "index"), dtype=dtype, rows_per_shard=4), embeddings)
    found = PassageIndex.load(folder)
    rounded = embeddings.to(getattr(torch, dtype))
    assert [len(shard) for shard in found.shards] == [4, 4, 2]
    torch.testing.assert_close(
        found.embeddings(torch.tensor([[9, 0], [5, 3]])), rounded[torch.tensor([[9, 0], [5, 3]])].float()
    )
    assert [p.id for p in found.at(torch.tensor([9, 0]))] == ["p9", "p0"]
    assert found.at(torch.tensor([3]))[0].text == "text of 3"
    with safe_open(folder / "embeddings-00003-of-00003.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("embeddings"), rounded[8:])  # any program can read the shards


def test_fewer_passages_than_asked_for_are_all_of_them(embeddings, tmp_path):
    found = PassageIndex.load(knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings))
    scores, places = found.search(embeddings[:2], 99)
    assert places.shape == (2, 10) and (scores[:, 0] == scores.max(1).values).all()


def test_query_of_another_width_is_refused(embeddings, tmp_path):
    found = PassageIndex.load(knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings))
    with pytest.raises(ConfigError, match=r"vectors of 4 numbers .made by tiny.*makes 5"):
        found.search(torch.zeros(1, 5), 2)


def test_index_of_other_weights_or_settings_is_stale(embeddings, tmp_path):
    found = PassageIndex.load(knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings))
    found.check_made_by({"path": "elsewhere", "pooling": "mean"}, "abc")
    with pytest.raises(ConfigError, match="stale: it was made with pooling: 'mean', and the retriever has 'cls'"):
        found.check_made_by({"path": "tiny", "pooling": "cls"}, "abc")
    with pytest.raises(ConfigError, match="stale: its passages were encoded with weights abc"):
        found.check_made_by({"path": "tiny", "pooling": "mean"}, "abd")


def test_missing_index_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index here.*index build"):
        PassageIndex.load(tmp_path / "nothing")


def test_flipped_bit_is_noticed_when_its_file_is_first_read(embeddings, tmp_path):
    folder = knowledge_index(IndexConfig(str(tmp_path / "index"), rows_per_shard=4), embeddings)
    shard, passages = folder / "embeddings-00002-of-00003.safetensors", folder / "passages.arrow"
    for path, position in ((shard, -5), (passages, passages.read_bytes().index(b"text of 7"))):
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
    found = PassageIndex.load(folder)
    assert found.embeddings(torch.tensor([0])).shape == (1, 4)  # of another file
    for read in (
        lambda index: index.search(embeddings[:1], 2),
        lambda index: index.embeddings(torch.tensor([5])),
        lambda index: index.at(torch.tensor([0])),
    ):
        with pytest.raises(
            ConfigError, match=r"(00002-of-00003.safetensors|passages.arrow): damaged .* Build the index"
        ):
            read(PassageIndex.load(folder))
    passages.write_bytes(passages.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"index: damaged \(.*\). Build the index again"):
        PassageIndex.load(folder)


@pytest.mark.parametrize(
    "columns", [{"id": ["x"] * 10, "text": ["x"] * 10}, dict.fromkeys(("id", "title", "text"), [1] * 10), {}, None]
)
def test_passages_of_another_form_are_refused(embeddings, tmp_path, columns):
    folder = knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings)
    columns = dict.fromkeys(("id", "title", "text"), [None] + ["x"] * 9) if columns is None else columns
    table = pa.table(columns)
    with pa.OSFile(str(folder / "passages.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match=r"damaged \(passages.arrow has .*needs texts in \['id', 'title', 'text'\]"):
        PassageIndex.load(folder)


def test_damaged_index_is_refused(embeddings, tmp_path):
    folder = knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings)
    shard = folder / "embeddings-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(ConfigError, match=r"not the embeddings of 4 numbers a row .*, 10\]"):
        PassageIndex.load(folder)
    shard.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        PassageIndex.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="not a manifest"):
        PassageIndex.load(folder)


def test_index_without_manifest_is_none(embeddings, tmp_path):
    """A build that was killed leaves a folder of another name."""
    folder = knowledge_index(IndexConfig(str(tmp_path / "index")), embeddings)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no index here"):
        PassageIndex.load(folder)


def test_new_index_takes_the_place_of_the_old_one(embeddings, tmp_path):
    config = IndexConfig(str(tmp_path / "index"))
    old = PassageIndex.load(knowledge_index(config, embeddings))
    new = PassageIndex.load(knowledge_index(config, embeddings + 1))
    torch.testing.assert_close(new.shards[0], embeddings + 1)
    torch.testing.assert_close(old.shards[0], embeddings)  # what is mapped stays readable
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
