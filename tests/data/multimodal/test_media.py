"""Images and sounds in records: every form that names them, what is dropped, and what is refused."""

import base64
import json
import os
import struct
import warnings
import wave
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.multimodal.media import UnreadableMediaError, open_image, open_sound
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError, RecordError
from lit_alignment.models.multimodal.modality import ModalityConfig
from tests.helpers import IMAGE, picture, vlm_data, vlm_module, write_jsonl


@pytest.fixture(scope="module")
def module():
    return vlm_module()


def rows(module, records, **settings):
    data = vlm_data(module, records, packing=False, **settings)
    data.setup("fit")
    return data, [data.examples["train"][i] for i in range(len(data.examples["train"]))]


ANSWER = {"role": "assistant", "content": "order"}


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "repair"}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file://a"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "a"}]}]},
        {"messages": [{"role": "user", "type": "image", "content": "a"}, {"role": "user", "content": "repair"}]},
        {"messages": [{"role": "user", "content": "<image> repair", "images": ["a"]}]},
        {"messages": [{"role": "user", "content": "<image> repair"}], "images": ["a"]},
        {"messages": [{"role": "user", "content": "repair"}], "image": "a"},
        {"conversations": [{"from": "human", "value": "<image>\nrepair"}], "image": "a"},
    ],
)
def test_every_form_of_a_record_gives_placeholders_and_files(module, record, tmp_path):
    image = picture(tmp_path / "a.png", 0)
    record = json.loads(json.dumps(record).replace('"a"', json.dumps(image)).replace('"file://a"', f'"file://{image}"'))
    name = "messages" if "messages" in record else "conversations"
    record[name].append(ANSWER if name == "messages" else {"from": "gpt", "value": "order"})
    _, (row,) = rows(module, [record])
    media = module.media["image"]
    assert row["input_ids"].count(media.token_id) == media.number
    assert json.loads(row["media"]) == {"image": [image]}


def test_several_images_stand_where_the_record_has_them(module, tmp_path):
    images = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    parts = [{"type": "image", "image": image} for image in images]
    first = {"role": "user", "content": [parts[0], parts[1], {"type": "text", "text": "order"}]}
    second = {"role": "user", "content": [{"type": "text", "text": "repair"}, parts[2]]}
    _, (row,) = rows(module, [{"messages": [first, ANSWER, second, ANSWER]}])
    assert json.loads(row["media"])["image"] == images
    assert row["input_ids"].count(module.media["image"].token_id) == 48


def test_relative_paths_begin_at_the_file_of_records_or_at_the_folder(module, tmp_path):
    picture(tmp_path / "images/a.png", 0)
    record = {"messages": [{"role": "user", "type": "image", "content": "images/a.png"}, ANSWER]}
    path = write_jsonl(tmp_path / "train.jsonl", [record])
    for folder in (None, str(tmp_path)):
        data = vlm_data(module, [record], packing=False, folder=folder)
        data.sources["train"] = [SourceConfig(path=path)]
        data.setup("fit")
        assert json.loads(data.examples["train"][0]["media"]) == {"image": [str(tmp_path / "images/a.png")]}


def test_truncation_keeps_images_whole(module, tmp_path):
    """Of three exchanges with an image each the oldest go, together with their images."""
    images = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    messages = []
    for image in images:
        messages += [{"role": "user", "content": [{"type": "image", "image": image}]}, ANSWER]
    for max_length in range(30, 120, 7):
        _, found = rows(
            module,
            [{"id": "x", "messages": messages}, {"messages": messages[:2]}],
            encoding=EncodingConfig(max_length=max_length),
        )
        for row in found:
            files = json.loads(row["media"])["image"]
            assert row["input_ids"].count(module.media["image"].token_id) == 16 * len(files)
            assert files == (images[-len(files) :] if row["id"] == "x" else images[:1])
            assert len(row["input_ids"]) <= max_length


def test_record_that_its_images_make_too_long_says_so(module, tmp_path):
    image = picture(tmp_path / "a.png", 0)
    record = {"messages": [{"role": "user", "type": "image", "content": image}, ANSWER]}
    data = vlm_data(
        module,
        [record, {"messages": [{"role": "user", "content": "order"}, ANSWER]}],
        packing=False,
        encoding=EncodingConfig(max_length=16),
    )
    data.setup("fit")
    line = data.reports["train"].line()
    assert "1 too_long" in line and "its images take 16 tokens, and encoding.max_length is 16" in line


@pytest.mark.parametrize(
    "messages, images, message",
    [
        ([{"role": "user", "content": "<image><image>"}], ["a", "b", "c"], "images' has 3 files, and the texts have 2"),
        ([{"role": "user", "content": "what is <image> here"}], None, "has 0 images, and its text has 1 times <image>"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, r"content\[0\].type' is 'video'"),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}],
            None,
            "is 'audio', and the model",
        ),
        ([{"role": "user", "type": "image", "content": "https://x/a.png"}], None, "Download the file"),
        ([{"role": "user", "type": "image", "content": "HTTPS://x/a.png"}], None, "Download the file"),
        ([{"role": "user", "type": "image", "content": "s3://bucket/a.png"}], None, "is 's3://bucket/a.png'. Download"),
        ([{"role": "user", "type": "image", "content": "File://host/a.png"}], None, "Download the file"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], None, r"content\[0\].text' is a number"),
        ([{"role": "user", "type": "image", "content": 3}], None, "is a number"),
        (
            [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
            ["a"],
            "no user message to stand in",
        ),
    ],
)
def test_bad_record_is_named(module, messages, images, message):
    record = {"messages": [*messages, ANSWER], **({"images": images} if images else {})}
    with pytest.raises(RecordError, match=message):
        vlm_data(module, [record]).setup("fit")


@pytest.mark.parametrize("broken", ["missing", "cut", "text"])
def test_unreadable_image_drops_its_record_with_its_path_or_is_an_error(module, broken, tmp_path):
    path = tmp_path / "broken.png"
    if broken != "missing":
        whole = open(picture(path, 0), "rb").read()
        path.write_bytes(whole[: len(whole) // 2] if broken == "cut" else b"no image")
    good = picture(tmp_path / "good.png", 1)
    records = [{"messages": [{"role": "user", "type": "image", "content": str(p)}, ANSWER]} for p in (path, good)]
    data, found = rows(module, records)
    assert [json.loads(row["media"])["image"] for row in found] == [[good]]
    assert "1 unreadable_image" in data.reports["train"].line() and str(path) in data.reports["train"].line()
    with pytest.raises(ConfigError, match="(?s)on_drop is 'error'.*broken.png"):
        vlm_data(module, records, on_drop="error").setup("fit")


def test_image_that_vanishes_later_is_named(module, tmp_path):
    path = tmp_path / "a.png"
    record = {"id": "x", "messages": [{"role": "user", "type": "image", "content": picture(path, 0)}, ANSWER]}
    data, _ = rows(module, [record])
    path.unlink()
    with pytest.raises(RecordError, match=r"train/x: field 'images' .*a.png: no such image.*put it back, and resume"):
        next(iter(data.train_dataloader()))


def test_tokens_cannot_be_truncated_inside_an_image(module):
    with pytest.raises(ConfigError, match="tokens would cut images"):
        vlm_data(module, [{}], encoding=EncodingConfig(truncation_unit="tokens"))


def test_placeholder_that_is_no_single_token_is_noticed(module, tmp_path):
    """As with a tokenizer that splits it: the number expected, the number found, and what to change."""
    record = {"messages": [{"role": "user", "type": "image", "content": picture(tmp_path / "a.png", 0)}, ANSWER]}
    data = vlm_data(module, [record], packing=False)
    data.encoder.media = {"image": replace(module.media["image"], token_id=5)}
    with pytest.raises(ConfigError, match=r"need 16 placeholders <image>, and 0 are there.*model.image.token"):
        data.setup("fit")


# Files.


def test_pictures_become_rgb_whatever_they_are(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (4, 4), 7).save(tmp_path / "gray.png")
    assert open_image(str(tmp_path / "gray.png")).getpixel((0, 0)) == (7, 7, 7)
    Image.new("RGB", (4, 4), (250, 10, 20)).save(tmp_path / "red.png")
    assert open_image(str(tmp_path / "red.png")).getpixel((0, 0)) == (250, 10, 20)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    assert open_image(url).getpixel((0, 0)) == (250, 10, 20)
    with pytest.raises(UnreadableMediaError, match="not a readable image"):
        open_image("data:image/png;base64,!!!")


@pytest.mark.parametrize("width, channels", [(1, 1), (2, 2), (4, 1)])
def test_sounds_become_one_channel_at_the_rate_that_is_needed(width, channels, tmp_path):
    wanted = np.sin(np.arange(800) / 20)
    scale, middle, kind = {1: (127, 128, "u1"), 2: (2**15 - 1, 0, "<i2"), 4: (2**31 - 1, 0, "<i4")}[width]
    samples = np.repeat((wanted * scale + middle).astype(kind)[:, None], channels, 1)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(samples.tobytes())
    np.testing.assert_allclose(open_sound(str(tmp_path / "a.wav"), 8000), wanted, atol=0.02)
    found = open_sound(str(tmp_path / "a.wav"), 16000)
    assert len(found) == 1600
    np.testing.assert_allclose(found[::2], wanted, atol=0.02)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(UnreadableMediaError, match="not a readable WAV file"):
        open_sound(str(tmp_path / "b.wav"), 8000)


def test_file_that_only_calls_itself_a_picture_starts_no_program(tmp_path, monkeypatch):
    """Pillow knows an EPS by its content, and hands it to Ghostscript."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert Image.open(path).format == "EPS"
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **settings: pytest.fail("a program was started"))
    with pytest.raises(UnreadableMediaError, match="a.png: not a readable image"):
        open_image(str(path))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_every_kind_of_picture_is_read_up_to_the_limit_of_pixels(name, tmp_path):
    path = str(tmp_path / name)
    frames = [Image.new("RGB", (300, 200), color) for color in ("white", "black")]
    animated = {"save_all": True, "append_images": frames[1:]} if name in ("a.gif", "a.webp", "a.tif") else {}
    frames[0].save(path, **animated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path, 60_000).size == (300, 200)
        with pytest.raises(UnreadableMediaError, match=r"more than 59999 pixels\. .*model\.image\.max_pixels"):
            open_image(path, 59_999)


def test_bomb_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("L", (10, 10)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(UnreadableMediaError, match=r"bomb.png: an image of more than 100000000 pixels"):
        open_image(str(path))


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (str(tmp_path / "a.png"), "/dev/zero", str(tmp_path), "a\0.png", "x" * 5000):
        with pytest.raises(UnreadableMediaError, match="not a readable image"):
            open_image(path)
        with pytest.raises(UnreadableMediaError, match="not a readable WAV file"):
            open_sound(path, 8000)


def wav(frames: int, rate: int, channels: int = 1, promised: int | None = None) -> bytes:
    """A WAV file of silence whose header may promise more frames than there are."""
    size = 2 * channels * (frames if promised is None else promised)
    form = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate & 0xFFFFFFFF, 2 * channels, 16)
    head = b"RIFF" + struct.pack("<I", 36 + size & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", size & 0xFFFFFFFF) + bytes(2 * channels * frames)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (wav(100_000, 1), "100000 samples of 1 channel.s. at 1 Hz, more than 30000000 .* model.audio.max_samples"),
        (wav(100, 8000, promised=2**30), "1073741824 samples .* more than 30000000"),
        (wav(100, 8000, promised=200), "its header promises 200 samples, and 100 are there"),
        (wav(10, 8000, channels=30_000, promised=2000), "2000 samples of 30000 channel.s. .* more than 30000000"),
        (wav(100, 0), "a sampling rate of 0"),
        (wav(100, 8000)[:44], "its header promises 100 samples, and 0 are there"),
        (b"", "it ends early"),
    ],
)
def test_header_of_a_sound_that_promises_too_much_is_refused(content, words, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(UnreadableMediaError, match=words):
        open_sound(str(path), 16_000)


def test_sound_of_a_table_is_read_from_its_data_url_and_the_limit_can_be_raised():
    url = "data:;base64," + base64.b64encode(wav(8000, 8000)).decode()
    assert len(open_sound(url, 16_000, max_samples=16_000)) == 16_000
    with pytest.raises(UnreadableMediaError, match="more than 15999"):
        open_sound(url, 16_000, max_samples=15_999)


def test_limit_of_pixels_is_the_models_and_decides_what_is_dropped(tmp_path):
    record = {"messages": [{"role": "user", "type": "image", "content": picture(tmp_path / "a.png", 0)}, ANSWER]}
    other = {"messages": [{"role": "user", "content": "order"}, ANSWER]}
    for most, dropped in ((2000, {}), (1999, {"unreadable_image": 1})):
        data, _ = rows(vlm_module(image=replace(IMAGE, max_pixels=most)), [record, other])
        assert data.reports["train"].dropped == dropped
    with pytest.raises(ConfigError, match="max_pixels is 0"):
        ModalityConfig(IMAGE.encoders, max_pixels=0)


def test_urls_of_any_case_are_files_and_data(module, tmp_path):
    path = picture(tmp_path / "a.png", 0)
    content = base64.b64encode(open(path, "rb").read()).decode()
    for given, found in ((f"FILE://{path}", path), (f"DATA:image/png;base64,{content}", None)):
        _, (row,) = rows(module, [{"messages": [{"role": "user", "type": "image", "content": given}, ANSWER]}])
        assert json.loads(row["media"])["image"] == [found or f"data:image/png;base64,{content}"]


def test_marks_around_an_image_are_single_tokens(tmp_path):
    module = vlm_module(image=replace(IMAGE, start="<img>", end="</img>"))
    record = {"messages": [{"role": "user", "type": "image", "content": picture(tmp_path / "a.png", 0)}, ANSWER]}
    _, (row,) = rows(module, [record])
    begin, end = (module.tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "</img>"))
    start = row["input_ids"].index(begin)
    assert row["input_ids"][start + 1 : start + 17] == [module.media["image"].token_id] * 16
    assert row["input_ids"][start + 17] == end
