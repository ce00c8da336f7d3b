"""The command line: a light dispatcher in front of LightningCLI and the tools."""

import importlib
import logging
import os
import signal
import sys
import threading

from lit_alignment.tools import TOOLS, TRAINER_COMMANDS


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 with one message where the input is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        from lit_alignment import __version__

        print(f"lit-alignment {__version__}")
        return 0
    # transformers imports DeepSpeed where it is installed, which then tells what it found, at every start.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    if command not in TOOLS and command not in TRAINER_COMMANDS:
        return _fail(f"unknown command '{command}'{_nearest(command)} (lit-alignment --help lists them)")
    return _guarded(command, arguments)


def _run(command: str, arguments: list[str]) -> None:
    if command in TRAINER_COMMANDS:
        # --config may also stand before the command in LightningCLI; here the command always comes first.
        importlib.import_module("lit_alignment.trainer_cli").main(arguments)
        return
    from lit_alignment.tools.parsers import PARSERS

    if command in PARSERS and {"-h", "--help"} & {*arguments}:
        PARSERS[command]().print_help()  # without what the tool imports
        return
    tool = importlib.import_module(TOOLS[command][0]).main
    if command != "demo":
        _quiet()
    tool(arguments[1:])


def _guarded(command: str, arguments: list[str]) -> int:
    """Run, turning errors that a user can fix into one message; a fault of ours keeps its traceback."""
    from lit_alignment.errors import AlignmentError, Stopped, disk_message

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    # Until a run takes them. Only the main thread may, and who ignores them, as `nohup` does, is left alone.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    taken = {each: signal.signal(each, stop) for each in numbers if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        _run(command, arguments)
    except KeyboardInterrupt:
        return _fail("interrupted. What was written is kept.", 130)
    except Stopped as stopped:
        code = int(stopped.code or 1)
        return _fail(str(stopped), code) if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0" else code
    except OSError as error:
        message = disk_message(error)
        if message is None:
            raise
        return _fail(message)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AlignmentError | FileNotFoundError):
            cause = cause.__cause__  # the parser wraps what a constructor raises
        if cause is None:
            raise
        return _fail(str(cause))
    finally:
        for each, handler in taken.items():
            signal.signal(each, handler)
    return 0


def _quiet() -> None:
    """Tools say themselves what there is to say: no notes of libraries, no bars for the loading of a model."""
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _fail(message: str, code: int = 2) -> int:
    from lit_alignment.secrets import mask_text
    from lit_alignment.terminal import printable

    print(f"lit-alignment: error: {printable(mask_text(message))}", file=sys.stderr)
    return code


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, [*TRAINER_COMMANDS, *TOOLS], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _help() -> str:
    lines = ["usage: lit-alignment COMMAND [--config FILE ...] [--key value ...]", "", "train and run models:"]
    lines += [f"  {name:<12}{text}" for name, text in TRAINER_COMMANDS.items()]
    lines += ["", "tools:"]
    lines += [f"  {name:<12}{text}" for name, (_, text) in TOOLS.items()]
    lines += [
        "",
        "`lit-alignment COMMAND --help` lists the settings of a command, `--print_config` prints them as YAML.",
        "Start with: lit-alignment init sft, or lit-alignment demo",
    ]
    return "\n".join(lines)


def entry() -> None:
    """The console script."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # while the package itself is imported
        code = 130
    except BrokenPipeError:  # whoever reads has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as of a command that SIGPIPE ends
    sys.exit(code)
