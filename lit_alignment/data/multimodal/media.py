"""Images and sounds of conversations: how records name them, how files are read, and their place among the tokens."""

import base64
import binascii
import io
import re
import stat
import warnings
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lit_alignment.data.encoding.messages import Message, read_message, value_kind
from lit_alignment.data.sources.content import content_hash
from lit_alignment.errors import AlignmentError, RecordError

MODALITIES = ("image", "audio")
PLURALS = {"image": "images", "audio": "audios"}  # where a message keeps its files
SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "audio": (".wav",),
}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # of SUFFIXES; Pillow knows others, and runs programs for some
URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
MAX_PIXELS = 100_000_000
MAX_SAMPLES = 30_000_000  # half an hour at 16 kHz


class UnreadableMediaError(AlignmentError):
    """An image or a sound that cannot be read; the message names the file and why."""


class MediaReader(Protocol):
    """Where a file's encoder inputs, or its features, come from."""

    def decides_reading(self) -> str:
        """What decides which files can be read, besides themselves."""
        ...

    def check(self, path: str) -> None:
        """Make sure that it can be read.

        Raises:
            UnreadableMediaError: If it cannot.
        """
        ...

    def fingerprint(self, path: str, folder: Path) -> str:
        """What the file holds, or its features, as a hash; `folder` is the cache, where hashes are remembered.

        Raises:
            UnreadableMediaError: If it is not there.
        """
        ...

    def read(self, path: str) -> list[Tensor]:
        """Inputs of each encoder, or the features alone.

        Raises:
            UnreadableMediaError: If it cannot be read.
        """
        ...


@dataclass(frozen=True)
class MediaTokens:
    """What stands in a conversation for an image, or a sound.

    Args:
        token: The placeholder; it is also what a record's text has in an image's place.
        token_id: Its id.
        number: Placeholders of one image.
        start: Text before them.
        end: Text after them.
        reader: Reads its files.
    """

    token: str
    token_id: int
    number: int
    start: str
    end: str
    reader: MediaReader

    def expanded(self) -> str:
        """The text of one image."""
        return self.start + self.token * self.number + self.end


# Files.


def open_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture in RGB, the first of an animated one; transparent places are white.

    Args:
        path: A file, or a `data:` URL with base64.
        max_pixels: A larger picture is not decoded.

    Raises:
        UnreadableMediaError: If it is missing, damaged, too large, or no picture.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow checks each part of a file as it meets it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_content(path), formats=FORMATS) as image:
                return _rgb(image)
    except FileNotFoundError as error:
        raise UnreadableMediaError(f"{path}: no such image (looked from {Path.cwd()})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableMediaError(
            f"{path[:200]}: an image of more than {max_pixels} pixels. Make it smaller, or raise model.image.max_pixels"
        ) from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UnreadableMediaError(f"{path[:200]}: not a readable image ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _content(path: str) -> io.BytesIO | str:
    """What a data URL holds, or the path of a file: to read from a pipe or a device would never end."""
    if path.startswith("data:"):
        return _data_url(path)
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("it is no file")
    return path


def _data_url(url: str) -> io.BytesIO:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data URL needs base64")
    try:
        return io.BytesIO(base64.b64decode(body, validate=True))
    except binascii.Error as error:
        raise ValueError(f"base64: {error}") from error


def open_sound(path: str, sampling_rate: int, max_samples: int = MAX_SAMPLES) -> NDArray[np.float32]:
    """A waveform of one channel, from -1 to 1, [samples].

    Args:
        path: A WAV file of 8, 16 or 32 bits, or a `data:` URL with base64.
        sampling_rate: Samples a second that are needed.
        max_samples: A longer sound is not read, whether at its own rate or at the one that is needed.

    Raises:
        UnreadableMediaError: If it is missing, damaged, too long, or in another form.
    """
    try:
        with wave.open(_content(path), "rb") as file:
            channels, width, rate, frames, *_ = file.getparams()
            if rate < 1:
                raise ValueError(f"a sampling rate of {rate}")
            if max(frames * channels, frames * sampling_rate // rate) > max_samples:
                raise UnreadableMediaError(
                    f"{path[:200]}: its header promises {frames} samples of {channels} channel(s) at {rate} Hz, more "
                    f"than {max_samples} at {rate} or {sampling_rate} Hz. Cut it, or raise model.audio.max_samples"
                )
            raw = file.readframes(frames)
            if len(raw) != frames * channels * width:
                raise ValueError(
                    f"its header promises {frames} samples, and {len(raw) // (channels * width)} are there"
                )
    except FileNotFoundError as error:
        raise UnreadableMediaError(f"{path}: no such sound (looked from {Path.cwd()})") from error
    except UnreadableMediaError:
        raise
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise UnreadableMediaError(
            f"{path[:200]}: not a readable WAV file ({str(error) or 'it ends early'})"
        ) from error
    kinds = {1: ("u1", 128.0, 128.0), 2: ("<i2", 0.0, 2.0**15), 4: ("<i4", 0.0, 2.0**31)}
    if width not in kinds or not raw:
        problem = f"a WAV file of {8 * width} bits and {len(raw)} bytes; use 8, 16 or 32 bits"
        raise UnreadableMediaError(f"{path[:200]}: {problem}")
    kind, middle, scale = kinds[width]
    values = np.frombuffer(raw, np.dtype(kind)).astype(np.float32)
    samples: NDArray[np.float32] = ((values - middle) / scale).reshape(-1, channels).mean(1, dtype=np.float32)
    if rate != sampling_rate:
        seconds = np.arange(int(len(samples) * sampling_rate / rate)) / sampling_rate
        samples = np.interp(seconds, np.arange(len(samples)) / rate, samples).astype(np.float32)
    return samples


@dataclass(frozen=True)
class FileReader:
    """Reads a file as the inputs of each encoder.

    Args:
        modality: `image` or `audio`.
        processors: transformers' processor of each encoder.
        largest: Pixels of an image, or samples of a sound, that are read at most.
    """

    modality: str
    processors: Sequence[Any]
    largest: int

    def decides_reading(self) -> str:
        """The limit."""
        return str(self.largest)

    def check(self, path: str) -> None:
        """Decode it once: a file whose end is missing has a whole header."""
        self._open(path)

    def fingerprint(self, path: str, folder: Path) -> str:
        """A hash of the file's bytes; a data URL is its own."""
        if path.startswith("data:"):
            return ""
        try:
            return content_hash(Path(path), folder)
        except OSError as error:
            raise UnreadableMediaError(
                f"{path}: cannot be read ({error.strerror}; looked from {Path.cwd()})"
            ) from error

    def read(self, path: str) -> list[Tensor]:
        """Inputs of each encoder."""
        opened = self._open(path)
        if self.modality == "audio":
            return [
                p(opened, sampling_rate=p.sampling_rate, return_tensors="pt")["input_features"][0]
                for p in self.processors
            ]
        return [torch.as_tensor(p(opened, return_tensors="pt")["pixel_values"][0]) for p in self.processors]

    def _open(self, path: str) -> Any:
        if self.modality == "audio":
            return open_sound(path, self.processors[0].sampling_rate, self.largest)
        return open_image(path, self.largest)


# Records.


def read_media_messages(
    raw_messages: list[Any], record: dict[str, Any], where: str, tokens: dict[str, str]
) -> list[Message]:
    """Validated messages, whose texts have a placeholder for each file, and their files under `images` and `audios`.

    Files stand in a message of their own (`{role, type: image, content: path}`), in a list of parts as OpenAI's,
    in `images` of a message, or in `image` or `images` of the record; in the last two forms the placeholder marks their
    places in the texts, or a part `{type: image}` without a file, as TRL's; the record's own stand before the first
    user message if no text has one.

    Args:
        raw_messages: The messages as the record has them.
        record: The record.
        where: File and line.
        tokens: Placeholder by modality.

    Raises:
        RecordError: If a record names more or fewer files than it has placeholders, or a file in no known way.
    """
    messages = []
    for index, raw in enumerate(raw_messages):
        text, files = _flattened(raw, f"messages[{index}]", where, tokens)
        message = read_message(text, index, where)
        messages.append(message | {PLURALS[modality]: paths for modality, paths in files.items() if paths})
    for modality, token in tokens.items():
        plural = PLURALS[modality]
        given = record.get(plural, record.get(modality))
        if given is not None:
            paths = [_path(each, plural, where) for each in (given if isinstance(given, list) else [given])]
            _deal(messages, paths, modality, token, where)
        for index, message in enumerate(messages):
            found, files = (message["content"] or "").count(token), message.get(plural, [])
            if found != len(files):
                raise RecordError(
                    where,
                    f"messages[{index}]",
                    f"has {len(files)} {plural}, and its text has {found} times {token}",
                    f"Give one file for each, or another model.{modality}.token if the text means something else.",
                )
    return messages


def _deal(messages: list[Message], paths: list[str], modality: str, token: str, where: str) -> None:
    """Give the record's own files to its messages, in the order of the placeholders in them."""
    plural = PLURALS[modality]
    if not any(token in (message["content"] or "") for message in messages):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise RecordError(where, plural, "has no user message to stand in", f"Write {token} into a message.")
        first["content"] = token * len(paths) + "\n" + first["content"]
    counts = [(message["content"] or "").count(token) - len(message.get(plural, [])) for message in messages]
    if sum(counts) != len(paths):
        problem = f"has {len(paths)} files, and the texts have {sum(counts)} times {token}"
        raise RecordError(where, plural, problem, "Give one file for each.")
    remaining = iter(paths)
    for message, count in zip(messages, counts, strict=True):
        if count > 0:
            message[plural] = [*message.get(plural, []), *(next(remaining) for _ in range(count))]


def _flattened(message: Any, path: str, where: str, tokens: dict[str, str]) -> tuple[Any, dict[str, list[str]]]:
    """A raw message whose content is a text with placeholders, and its files by modality."""
    files: dict[str, list[str]] = {modality: [] for modality in tokens}
    if not isinstance(message, dict):
        return message, files
    kind, content = message.get("type"), message.get("content", message.get("value"))
    if kind in MODALITIES:
        content = [{"type": kind, kind: content}]
    if isinstance(content, list):
        pieces = []
        for number, part in enumerate(content):
            place = f"{path}.content[{number}]"
            modality, value = _part(part, place, where)
            if modality == "text":
                if not isinstance(value, str | None):
                    raise RecordError(where, f"{place}.text", f"is {value_kind(value)}", "Make it a string.")
                pieces.append(value or "")
                continue
            if modality not in tokens:
                taken = " and ".join(tokens)
                raise RecordError(
                    where, f"{place}.type", f"is '{modality}', and the model takes {taken}", f"Set model.{modality}."
                )
            if value is not None:  # else it is one of the record's own files
                files[modality].append(_path(value, place, where))
            pieces.append(tokens[modality])
        message = {**message, "content": "".join(pieces)}
    for modality in tokens:
        own = message.get(PLURALS[modality])
        if own is not None:
            paths = own if isinstance(own, list) else [own]
            files[modality] += [_path(each, f"{path}.{PLURALS[modality]}", where) for each in paths]
    return message, files


def _part(part: Any, path: str, where: str) -> tuple[str, Any]:
    """Modality and value of one of OpenAI's parts."""
    kind = part.get("type") if isinstance(part, dict) else None
    match kind:
        case "text":
            return "text", part.get("text", "")
        case "image" | "image_url" | "audio" | "input_audio" | "audio_url":
            modality = "image" if kind.startswith("image") else "audio"
            value = part.get(kind, part.get(modality, part.get("path", part.get("url"))))
            return modality, value.get("url", value.get("path")) if isinstance(value, dict) else value
    raise RecordError(where, f"{path}.type", f"is {kind!r}", "Use text, image or image_url, audio or audio_url.")


def _path(value: Any, path: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise RecordError(where, path, f"is {value_kind(value)}", "Give the path of a file.")
    if value[:5].lower() == "data:":
        return f"data:{value[5:]}"
    scheme = URL.match(value)
    if scheme is None:
        return value
    local = value[scheme.end() :]
    if scheme[1].lower() != "file" or not local.startswith("/"):
        raise RecordError(where, path, f"is {value!r}", "Download the file, and give its path.")
    return local


def files_of(messages: Sequence[Message], modality: str) -> list[str]:
    """The files of a conversation, in the order of their placeholders."""
    return [path for message in messages for path in message.get(PLURALS[modality], [])]


def list_files(folder: Path, modality: str) -> list[Path]:
    """All files of a modality below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES[modality])
