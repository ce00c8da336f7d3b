"""The cache of encoded data: other content, damage, a full disk, and several processes at once."""

import os
import pickle
import random
import resource
import time
from collections import Counter

import pytest

from lit_alignment import SFTDataModule
from lit_alignment.data.sources import content, record_batches
from lit_alignment.data.sources.cache import cached_rows
from lit_alignment.data.sources.content import content_hash
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import AlignmentError, CacheError
from tests.helpers import chats, write_jsonl
from tests.helpers.commands import command


def loaded(tokenizer, cache, path, **settings):
    data = SFTDataModule(tokenizer, train=[SourceConfig(str(path))], cache_dir=str(cache), **settings)
    data.setup("fit")
    return data


def long_ago(path):
    """As if it had been written an hour ago."""
    moment = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(moment, moment))


def flip(path, position, bit=0):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def cached(cache):
    (file,) = cache.glob("examples-*.arrow")
    return file


@pytest.mark.parametrize("same_tick", [False, True])
def test_other_content_of_the_same_size_and_time_is_encoded_again(tokenizer, tmp_path, monkeypatch, same_tick):
    if not same_tick:  # files are remembered at once
        monkeypatch.setattr(content, "SETTLED", 0)
    source = tmp_path / "data.jsonl"
    write_jsonl(source, chats(4))
    long_ago(source)
    before = source.stat()
    first = loaded(tokenizer, tmp_path / "cache", source).examples["train"]
    text = source.read_text()
    source.write_text(text.replace("kitchen", "nehctik"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns) and "kitchen" in text
    assert loaded(tokenizer, tmp_path / "cache", source).examples["train"]["input_ids"] != first["input_ids"]


def test_what_a_file_holds_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SETTLED", 0)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    found = content_hash(file, tmp_path)
    (tmp_path / content.REMEMBERED).open("a").write('["cut o')
    content._remembered.cache_clear()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr(content, "file_hash", lambda path: pytest.fail("read again"))
        assert content_hash(file, tmp_path) == found
    file.write_bytes(b"two")
    assert content_hash(file, tmp_path) != found


def test_no_flipped_bit_is_trained(tokenizer, tmp_path, caplog):
    """One anywhere in the file is noticed when it is opened, or when its batch is read, or decides nothing."""
    source, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    write_jsonl(source, chats(12))
    whole = list(loaded(tokenizer, cache, source).examples["train"])
    file, data = cached(cache), cached(cache).read_bytes()
    choose, noticed = random.Random(0), Counter()
    for _ in range(40):
        file.write_bytes(data)
        flip(file, choose.randrange(len(data)), choose.randrange(8))
        caplog.clear()
        examples = loaded(tokenizer, cache, source).examples["train"]
        noticed["open"] += len(warned(caplog))
        try:
            assert list(examples) == whole
        except CacheError:
            noticed["read"] += 1
            assert not file.exists()
    assert noticed["open"] >= 5 and noticed["read"] >= 20 and noticed.total() <= 40, noticed


def test_cut_off_file_is_made_again(tokenizer, tmp_path, caplog):
    source, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    write_jsonl(source, chats(40))
    whole = list(loaded(tokenizer, cache, source).examples["train"])
    data = cached(cache).read_bytes()
    for size in (0, 1, 50, len(data) // 2, len(data) - 60, len(data) - 1):
        caplog.clear()
        cached(cache).write_bytes(data[:size])
        assert list(loaded(tokenizer, cache, source).examples["train"]) == whole
        assert cached(cache).read_bytes() == data
        (message,) = warned(caplog)
        assert "cached data are damaged" in message and "made again" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_found_in_training_is_one_message_and_gone_at_the_next_start(tokenizer, tmp_path, num_workers):
    source, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    write_jsonl(source, chats(40))
    data = loaded(tokenizer, cache, source, num_workers=num_workers)
    content, ids = cached(cache).read_bytes(), data.examples["train"][7]["input_ids"]
    flip(cached(cache), content.index(b"".join(each.to_bytes(4, "little") for each in ids)))
    data = loaded(tokenizer, cache, source, num_workers=num_workers)
    with pytest.raises(CacheError) as raised:
        list(data.train_dataloader())
    assert str(raised.value).startswith(f"{cache}/examples-")
    assert "(the column 'input_ids' has another checksum). They were deleted, and are made again" in str(raised.value)
    list(loaded(tokenizer, cache, source).train_dataloader())
    assert cached(cache).read_bytes() == content


def test_rows_travel_to_processes_that_are_not_forked(tokenizer, tmp_path):
    source = tmp_path / "data.jsonl"
    write_jsonl(source, chats(12))
    examples = loaded(tokenizer, tmp_path / "cache", source).examples["train"]
    pickled = pickle.dumps(examples)
    assert list(pickle.loads(pickled)) == list(examples) and len(pickled) < 5000


def test_long_rows_are_in_smaller_batches(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(record_batches, "BYTES", 20_000)
    source = tmp_path / "data.jsonl"
    write_jsonl(source, chats(40))
    (file,) = loaded(tokenizer, tmp_path / "cache", source).examples["train"].files
    sizes = [batch.nbytes for batch in file.batches]
    assert len(sizes) > 2 and max(sizes) < 30_000


class TestFull:
    def test_disk_is_one_message_and_nothing_is_left(self, tokenizer, tmp_path):
        source, cache = tmp_path / "data.jsonl", tmp_path / "cache"
        write_jsonl(source, chats(300))
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, usual[1]))
        try:
            with pytest.raises(
                CacheError, match=r"cannot be written \(File too large\). Free its disk, or set data.cache"
            ):
                loaded(tokenizer, cache, source, num_proc=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert [file.name for file in cache.iterdir()] == []
        loaded(tokenizer, cache, source, num_proc=1)

    def test_folder_that_cannot_be_made_is_one_message(self, tokenizer, tmp_path):
        source = tmp_path / "data.jsonl"
        write_jsonl(source, chats(3))
        with pytest.raises(
            CacheError, match=r"data.jsonl/cache/examples-\w+.arrow: cannot be written \(Not a directory\)"
        ):
            loaded(tokenizer, source / "cache", source)

    def test_error_in_a_source_is_not_said_of_the_cache(self, tokenizer, tmp_path):
        def rows():
            raise FileNotFoundError("gone")
            yield {}

        features = SFTDataModule(tokenizer).features
        with pytest.raises(FileNotFoundError, match="gone"):
            cached_rows(tmp_path / "cache/a.arrow", rows, features, [])


def test_two_processes_that_make_the_same_file_do_not_disturb_each_other(tokenizer, tmp_path):
    """The second begins and ends while the first writes."""
    features, path = SFTDataModule(tokenizer).features, tmp_path / "a.arrow"
    source = tmp_path / "data.jsonl"
    write_jsonl(source, chats(20))
    rows = list(loaded(tokenizer, tmp_path / "cache", source).examples["train"])

    def interrupted():
        yield from rows[:10]
        assert list(cached_rows(path, lambda: iter(rows), features, ["id"])) == rows
        yield from rows[10:]

    assert list(cached_rows(path, interrupted, features, ["id"])) == rows
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.arrow", "cache", "data.jsonl"]


def test_command_says_it_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = command(
        "inspect", "--config", "configs/sft/tiny.yaml", f"--data.init_args.cache_dir={tmp_path / 'file/y'}"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "Not a directory" in result.stderr and issubclass(CacheError, AlignmentError)
