"""Secrets, told by their names: nothing that leaves the process shows them."""

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
WORDS = set("secret secrets password passwd passphrase pwd credential credentials creds apikey authorization".split())
WORDS |= set("auth bearer cookie dsn jwt pat pkey accesskey secretkey sig signature".split())  # sig: of signed URLs
NAMES = {"connection_string"}
# A token of these is a tokenizer's, or a placeholder; others, such as `hf_token`, are to log in with.
OF_TEXT = set("audio bos cls end eos first image last mask pad sep special start stop unk".split())
# What storage and HTTP take: all that stands in it is hidden but for what is PUBLIC.
OPTIONS = {"storage_options", "headers"}
PUBLIC = {"anon", "endpoint", "endpoint_url", "project", "profile", "region", "region_name", "use_ssl", "verify"}
TEXTS = {"records", "system_prompt", "variables"}  # data, in which nothing is a secret by its name

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_URL = re.compile(r"[\w+.-]+://\S*")
_LOGIN = re.compile(r"(?<=://)[^@\s'\"]+@")
_QUERY = re.compile(r"(?P<name>(?<=[?&])[\w.-]+)(?P<sign>=)(?P<value>[^'\"&\s]+)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
_PAIR = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)(?P<sign>['"]?\s*[:=]\s*)(?P<value>"[^"]*"|'[^']*'|\*{3}|[^'",}&\s]+)"""
)


def is_secret(name: str, parent: str = "") -> bool:
    """Whether the value under a name is to be hidden: a key, a password, or a token to log in with.

    Args:
        name: Of a setting, an option or an environment variable.
        parent: Of what it belongs to.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    if WORDS & set(words) or words[-1] == "key" or name.lower() in NAMES:
        return True
    return words[-1] == "token" and (words[-2] if len(words) > 1 else parent) not in OF_TEXT


def masked(values: Any, name: str = "", parent: str = "", hidden: bool = False) -> Any:
    """Settings with a mask in place of each secret, and of logins in URLs.

    Args:
        values: Anything that stands in a configuration.
        name: What it stands under.
        parent: What that stands under.
        hidden: Whether it is a part of something secret.
    """
    if name in TEXTS:
        return values
    hidden = (hidden or name in OPTIONS or is_secret(name, parent)) and name not in PUBLIC
    if isinstance(values, dict):
        return {key: masked(value, str(key), name, hidden) for key, value in values.items()}
    if isinstance(values, argparse.Namespace):  # and the parser's own
        return type(values)(**masked(vars(values), name, parent, hidden))
    if isinstance(values, list | tuple):
        return type(values)(masked(value, name, parent, hidden) for value in values)
    if hidden and values not in (None, "") and not isinstance(values, bool):
        return MASK
    return _masked_url(values) if isinstance(values, str) and _URL.fullmatch(values) else values


def mask_text(text: str) -> str:
    """A text with a mask in place of each value whose name is a secret's, and of logins in URLs."""
    return _PAIR.sub(_hide, _BEARER.sub(rf"\1 {MASK}", _masked_url(text)))


def masks_in(values: Any, path: str = "") -> Iterator[str]:
    """Where masks stand in a configuration: one that a run has saved does not hold what they stand for."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key not in TEXTS:
                yield from masks_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from masks_in(value, f"{path}[{number}]")
    elif isinstance(values, str) and (values == MASK or (_URL.fullmatch(values) and MASK in values)):
        yield path


def _masked_url(text: str) -> str:
    return _QUERY.sub(_hide, _LOGIN.sub(f"{MASK}@", text))


def _hide(found: re.Match[str]) -> str:
    spoken_of = found["name"] == "key" and found["sign"][0] in ": ="  # messages say which key is wrong
    return found[0] if spoken_of or not is_secret(found["name"]) else f"{found['name']}{found['sign']}{MASK}"
