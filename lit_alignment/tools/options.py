"""Options of the tools: full names only, numbers within their bounds, and one message for a wrong one."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from lit_alignment.errors import ConfigError

OPTION = re.compile("--?[a-zA-Z]")  # how one begins; a question may begin with a minus
SETTINGS = ("config", "print_config", "trainer", "model", "data", "seed_everything", "engine", "vllm", "ckpt_path")


class OptionParser(argparse.ArgumentParser):
    """A parser of options and positional arguments in any order, whose complaints are ConfigErrors.

    Args:
        prog: The command.
        description: What it does.
        epilog: What stands below its options.
    """

    def __init__(self, prog: str, description: str = "", epilog: str = "") -> None:
        """Abbreviations are refused: they would change their meaning with the next option."""
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: Always; with the nearest option where one is unknown.
        """
        word = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        nearest = self._nearest(word) if word != message.partition(" ")[0] else None
        hint = f"Did you mean '{nearest}'?" if nearest else f"`{self.prog} --help` lists the options."
        raise ConfigError(f"{self.prog}: {message}. {hint}")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The tool's options and positional arguments, and all other words in their order.

        argparse alone fills positional arguments at the first of them, and with the values of unknown options.
        """
        own, positional, rest = self._sorted(args)
        options, left = super().parse_known_args([*own, "--", *positional] if positional else own, namespace)
        return options, left + rest

    def _sorted(self, words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        """Own options with their values, positional arguments, and what is unknown.

        An unknown option takes the word behind it. What is more than the positional arguments is unknown too.
        """
        sizes = [action.nargs for action in self._get_positional_actions()]
        most = math.inf if "+" in sizes else len(sizes)
        own: list[str] = []
        positional: list[str] = []
        rest: list[str] = []
        into, missing = rest, 0.0  # values of the last option
        for number, word in enumerate(words):
            if word == "--":
                positional += words[number + 1 :]
                break
            name, equals, _ = word.partition("=")
            if OPTION.match(word):
                action = self._option_string_actions.get(name)
                into, size = (rest, None) if action is None else (own, action.nargs)
                missing = math.inf if size == "+" else int(size is None)
                if equals or name == "--print_config":
                    missing = 0
            elif missing:
                missing -= 1
            else:
                into = positional if len(positional) < most else rest
            into.append(word)
        return own, positional, rest

    def split(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The tool's own options, and those that are settings of a configuration.

        Raises:
            ConfigError: If one of the latter is no setting, but nearly an option of the tool.
        """
        options, rest = self.parse_known_args(arguments)
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name[2:] not in SETTINGS and self._nearest(name):
                self.error(f"unrecognized arguments: {word}")
        return options, rest

    def _nearest(self, word: str) -> str | None:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        name = word.partition("=")[0]
        longer = [option for option in known if len(name) > 3 and option.startswith(name)]
        return next(iter([*longer, *get_close_matches(name, known, n=1)]), None)


def whole(least: int) -> Callable[[str], int]:
    """What reads an integer that is not below `least`."""

    def read(text: str) -> int:
        if not (text.removeprefix("-").isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"is '{text}'; use a whole number, {least} or more")
        return int(text)

    return read


def positive(most: float = math.inf) -> Callable[[str], float]:
    """What reads a number above 0, and not above `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or math.isinf(value):
            bound = "" if math.isinf(most) else f", at most {most:g}"
            raise argparse.ArgumentTypeError(f"is '{text}'; use a number above 0{bound}")
        return value

    return read
