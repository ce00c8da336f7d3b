"""What files hold, as hashes; a file that has not changed is read once."""

import json
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

REMEMBERED = "content.jsonl"  # in the folder of the cache: what files held, line by line
SETTLED = 2_000_000_000  # nanoseconds after which another write gets another time of change, on any file system
BLOCK = 1 << 20


def file_hash(path: Path) -> str:
    """A hash of a file's bytes (XXH3, 128 bits)."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def content_hash(path: Path, folder: Path) -> str:
    """The same, remembered by its path, size, times of change and inode.

    Args:
        path: The file.
        folder: Where it is remembered.
    """
    key = _key(path)
    known = _remembered(folder)
    if key not in known:
        known[key] = file_hash(path)
        # A file that was written a moment ago may be written again within the same tick of its clock.
        if key != _key(path) or time.time_ns() - max(key[2], key[3]) < SETTLED:
            return known.pop(key)
        with suppress(OSError):  # a folder that is full or read-only costs the next start another reading
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / REMEMBERED).open("a", encoding="utf-8") as file:
                file.write(json.dumps([*key, known[key]]) + "\n")
    return known[key]


def _key(path: Path) -> tuple[Any, ...]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@cache
def _remembered(folder: Path) -> dict[tuple[Any, ...], str]:
    """The hashes by key; a line that was cut off, or written into another, is passed over: its file is read again."""
    known: dict[tuple[Any, ...], str] = {}
    if (folder / REMEMBERED).is_file():
        for line in (folder / REMEMBERED).read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                *key, digest = json.loads(line)
                known[tuple(key)] = str(digest)
    return known
