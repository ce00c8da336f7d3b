"""A conversation in the terminal: what is said, and the commands that begin with a slash."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_alignment.data.asking import PromptTooLongError
from lit_alignment.data.encoding.messages import Message
from lit_alignment.errors import AlignmentError, ConfigError
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.terminal import printable
from lit_alignment.tools.chat import COMMANDS, note


@dataclass
class Chat:
    """A conversation.

    Args:
        module: Answers.
        decoding: How.
        system: The system prompt.
        messages: What was said.
        images: Files to show with the next message.
    """

    module: AlignmentModule
    decoding: DecodingConfig
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def conversation(self) -> list[Message]:
        """The system prompt, and what was said."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def answer(self, text: str, alone: bool = False) -> None:
        """Print the answer to a message while it is generated, and what it was retrieved from, and keep both messages.

        Args:
            text: The message.
            alone: Whether errors end the program.

        Raises:
            AlignmentError: If `alone`, and it cannot be asked.
        """
        parts: list[dict[str, Any]] = [{"type": "image", "image": file} for file in self.images]
        self.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text})
        said: list[str] = []

        def say(piece: str) -> None:
            said.append(piece)
            print(printable(piece), end="", flush=True)

        try:
            (response,) = self.module.answers([self.conversation()], self.decoding, on_text=say)
        except AlignmentError as error:
            self.messages.pop()
            if alone:
                raise
            note(f"not asked: {_problem(error)}")
            return
        except KeyboardInterrupt:
            if alone:
                raise
            print()
            note("stopped; what was said is kept" if said else "stopped")
        else:
            (completion,) = response.completions
            if not said:  # one of several prompts, each with a passage, comes as a whole
                say(completion.text)
            print(flush=True)
            for number, passage in enumerate(response.retrieved.get("documents", []), start=1):
                note(f"  [{number}] {passage['title'] or passage['id']}")
            if completion.finish_reason == "length":
                note(self._cut(completion.num_tokens))
        self.images = []
        if any(said):
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()  # two messages of a user in a row are refused by many templates

    def _cut(self, num_tokens: int) -> str:
        if num_tokens < self.decoding.max_new_tokens:
            return f"cut: the context of {self.module.num_positions} tokens is full. /reset begins a new conversation."
        return f"cut after {num_tokens} tokens; --max-new-tokens is the limit"

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self.messages, self.images = [], []
                note("a new conversation")
            case "/system":
                self.system = rest or None
                note("system prompt set" if rest else "no system prompt")
            case "/image" if rest:
                try:
                    self.show([rest])
                    note("shown with the next message")
                except ConfigError as error:
                    note(str(error))
            case "/save":
                self.save(rest)
            case "/help":
                width = max(map(len, COMMANDS))
                note("\n".join(f"{each:<{width}}  {what}" for each, what in COMMANDS.items()))
            case _:
                note(f"unknown command {name}; /help lists them")

    def show(self, files: list[str]) -> None:
        """Keep images for the next message.

        Raises:
            ConfigError: If the model sees none, or a file is missing.
        """
        if files and "image" not in self.module.media_shapes():
            raise ConfigError("this model sees no images.")
        missing = next((file for file in files if not Path(file).expanduser().is_file()), None)
        if missing is not None:
            raise ConfigError(f"{missing}: no such image (looked from {Path.cwd()}).")
        self.images += [str(Path(file).expanduser()) for file in files]

    def save(self, name: str) -> None:
        """Append the conversation to a file, one record a line, as `SourceConfig` reads it."""
        if not name or not self.messages:
            note("/save FILE: give a file" if not name else "nothing was said yet")
            return
        path = Path(name).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.conversation()}, ensure_ascii=False) + "\n")
        except OSError as error:
            note(f"{path}: cannot be written ({error.strerror})")
            return
        note(f"appended to {path}")


def _problem(error: AlignmentError) -> str:
    if isinstance(error, PromptTooLongError):
        return (
            f"the conversation has {error.length} tokens, and the model {error.positions} positions. "
            "/reset begins a new one; /save FILE keeps this one."
        )
    return str(error)
