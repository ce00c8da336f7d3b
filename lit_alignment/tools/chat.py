"""`lit-alignment chat`: talk to a trained model in the terminal."""

import signal
import sys
import time
from typing import TYPE_CHECKING

from lit_alignment.tools.options import OptionParser, whole

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
    """Answer one question, or one after the other until the input ends.

    Raises:
        ConfigError: If the model cannot be loaded, or answers no prompts.
    """
    options = _parser().parse_args(arguments)
    begin, talks = time.perf_counter(), options.question is None and sys.stdin.isatty()
    if talks:
        note(f"loading {options.source} ...")
    # From here on heavy imports: a terminal is told first.
    from lit_alignment.generation.settings import DecodingConfig
    from lit_alignment.modules.answering import load_answering
    from lit_alignment.tools.chat_session import Chat

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    decoding = DecodingConfig(stop_strings=options.stop, **{name: getattr(options, name) for name in names})
    module = load_answering(options.source, options.base, options.device, options.trust_remote_code)
    chat = Chat(module, decoding, options.system)
    chat.show(options.image)
    if options.question is not None:
        chat.answer(options.question, alone=True)
        return
    if talks:
        note(f"{_about(module)}, ready in {time.perf_counter() - begin:.1f} s")
        note("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends")
    _converse(chat, talks)


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="lit-alignment chat",
        description="Talk to a trained model. Without a question, one line of the input is one message; "
        + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
        + ".",
    )
    parser.add_argument("source", help="a checkpoint, an adapter folder, an exported folder, or a model's name")
    parser.add_argument("question", nargs="?", help="ask this alone, and end")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--image", action="append", default=[], help="an image to show with the first message")
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely tokens (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (default: 1)")
    parser.add_argument("--top-k", type=whole(0), default=0, help="sample from this many tokens (default: 0, all)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens seen before (default: 1)")
    parser.add_argument("--stop", action="append", default=[], help="an answer ends before this text; may be repeated")
    parser.add_argument("--seed", type=whole(0), default=0, help="of sampling (default: 0)")
    parser.add_argument("--base", help="the base model, if it is not where the source says")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


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
