"""Secrets, told by their names: nothing that leaves the process shows them."""

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
WORDS = {
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "credential",
    "credentials",
    "apikey",
    "authorization",
}
WORDS |= {"sig", "signature"}  # of signed URLs
# A token of these is one to log in with; others, such as `pad_token`, are a tokenizer's.
OF_LOGINS = {
    "access",
    "api",
    "auth",
    "bearer",
    "bot",
    "hf",
    "hub",
    "id",
    "oauth",
    "refresh",
    "sas",
    "security",
    "session",
}
MODALITIES = {"image", "audio"}  # whose `token` is a placeholder

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(?P<name>(?<=[?&])[\w.-]+)(?P<sign>=)(?P<value>[^'\"&\s]+)")
_PAIR = re.compile(r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>['"]?\s*[:=]\s*['"]?)(?P<value>[^'",}&\s]+)""")


def is_secret(name: str, parent: str = "") -> bool:
    """Whether the value under a name is to be hidden: a key, a password, or a token to log in with.

    Args:
        name: Of a setting, an option or an environment variable.
        parent: Of what it belongs to.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    if WORDS & set(words) or words[-1] == "key":
        return True
    alone = len(words) == 1 and parent not in MODALITIES
    return words[-1] == "token" and (alone or (len(words) > 1 and words[-2] in OF_LOGINS))


def masked(values: Any, name: str = "", parent: str = "") -> Any:
    """Settings with a mask in place of each secret, and of logins in URLs.

    Args:
        values: Anything that stands in a configuration.
        name: What it stands under.
        parent: What that stands under.
    """
    if isinstance(values, dict):
        return {key: masked(value, str(key), name) for key, value in values.items()}
    if isinstance(values, argparse.Namespace):  # and the parser's own
        return type(values)(**masked(vars(values), name, parent))
    if isinstance(values, list | tuple):
        return type(values)(masked(value, name, parent) for value in values)
    if is_secret(name, parent) and values not in (None, "") and not isinstance(values, bool):
        return MASK
    return mask_text(values) if isinstance(values, str) and "://" in values else values


def mask_text(text: str) -> str:
    """A text with a mask in place of each value whose name is a secret's, and of logins in URLs."""

    def mask(found: re.Match[str]) -> str:
        spoken_of = found["name"] == "key" and found["sign"][0] in ": ="  # messages say which key is wrong
        return found[0] if spoken_of or not is_secret(found["name"]) else f"{found['name']}{found['sign']}{MASK}"

    return _PAIR.sub(mask, _QUERY.sub(mask, _LOGIN.sub(f"{MASK}@", text)))


def masks_in(values: Any, path: str = "") -> Iterator[str]:
    """Where masks stand in a configuration: one that a run has saved does not hold what they stand for."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from masks_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from masks_in(value, f"{path}[{number}]")
    elif values == MASK or (isinstance(values, str) and f"://{MASK}@" in values):
        yield path
