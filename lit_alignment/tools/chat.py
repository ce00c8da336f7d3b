"""`lit-alignment chat`: talk to a trained model in the terminal."""

import signal
import sys
import time
from typing import TYPE_CHECKING

from lit_alignment.tools import parsers

if TYPE_CHECKING:
    from lit_alignment.modules.base import AlignmentModule
    from lit_alignment.tools.chat_session import Chat

COMMANDS = {
    "/reset": "begin a new conversation",
    "/system TEXT": "set the system prompt; without TEXT remove it",
    "/image FILE": "show an image with the next message, to a model that sees",
    "/save FILE": "append the conversation to a file, as a record of training data",
    "/help": "list these",
}


def main(arguments: list[str]) -> None:
    """Answer one question, or one after the other until the input ends; with an index also say from which passages.

    Raises:
        ConfigError: If the model cannot be loaded, or answers no prompts.
    """
    options = parsers.chat().parse_intermixed_args(arguments)  # the question may stand behind options
    begin, talks = time.perf_counter(), options.question is None and sys.stdin.isatty()
    if talks:
        note(f"loading {options.source} ...")
    # From here on heavy imports: a terminal is told first.
    from lit_alignment.generation.settings import DecodingConfig
    from lit_alignment.modules.answering import generator_alone, load_answering
    from lit_alignment.tools.chat_session import Chat

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    decoding = DecodingConfig(stop_strings=options.stop, **{name: getattr(options, name) for name in names})
    alone = generator_alone(options.source)
    if alone and options.index is None:
        note(f"{options.source}: {alone}")
    module = load_answering(options.source, options.base, options.device, options.trust_remote_code, options.index)
    chat = Chat(module, decoding, options.system)
    chat.show(options.image)
    if options.question is not None:
        chat.answer(options.question, alone=True)
        return
    if talks:
        note(f"{_about(module)}, ready in {time.perf_counter() - begin:.1f} s")
        note("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends")
    _converse(chat, talks)


def _about(module: "AlignmentModule") -> str:
    weight = next(module.parameters())
    millions = sum(p.numel() for p in module.parameters()) / 1e6
    room = "" if module.num_positions is None else f", context {module.num_positions} tokens"
    return f"{millions:.0f}M parameters, {str(weight.dtype).removeprefix('torch.')} on {weight.device}{room}"


def note(text: str) -> None:
    """Say something that is no answer; answers alone go to the standard output."""
    from lit_alignment.terminal import printable

    print(printable(text), file=sys.stderr, flush=True)


def _converse(chat: "Chat", talks: bool) -> None:
    """Read and answer until the input ends.

    Args:
        chat: The conversation.
        talks: Whether somebody types at a terminal.
    """
    if talks:
        import readline  # noqa: F401 - the line can be edited, and earlier ones come back
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = input("> " if talks else "").strip()
        except EOFError:
            if talks:
                print()
            return
        except KeyboardInterrupt:
            print()
            if not talks:
                raise
            note("Ctrl-D ends")
            continue
        if line.startswith("/"):
            chat.command(line)
        elif line:
            chat.answer(line)
