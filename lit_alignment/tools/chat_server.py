"""`lit-alignment serve --engine transformers`: OpenAI's chat API and a page to chat on, for one loaded module.

The server of `transformers serve` loads whatever model a client names, takes a temperature without sampling, leaves
stop strings in answers, and generates past the last position. Here answers are those of `predict`.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_alignment.errors import AlignmentError, ConfigError, require
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.modules.base import AlignmentModule

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).with_name("chat_page.html")
LOOPBACK = ("127.0.0.1", "localhost")
MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
READ = {"model", "messages", "tools", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
READ |= {"temperature", "top_p", "top_k", "stop", "seed", "n", "user", "metadata", "store"}
# Of what is not computed here, the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
}


class RequestError(AlignmentError):
    """A request that is refused.

    Args:
        message: Why.
        status: Of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        """Keep the status."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks.

    Args:
        record: The conversation, with tools.
        decoding: How to answer.
        stream: Whether the answer is sent while it is generated.
        usage: Whether a stream ends with the numbers of tokens.
    """

    record: dict[str, Any]
    decoding: DecodingConfig
    stream: bool
    usage: bool


def read_request(body: Any, name: str, max_new_tokens: int) -> ChatRequest:
    """What the body of a request asks, in the words of this library.

    Args:
        body: Parsed JSON.
        name: Of the model.
        max_new_tokens: Longest answer, where the request does not say.

    Raises:
        RequestError: If it is malformed, asks for another model, or for what is not computed here.
        ConfigError: If its decoding makes no sense.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RequestError("give {model, messages: [{role, content}, ...]}")
    if body.get("model", name) != name:
        raise RequestError(f"the model is called {name!r} here, and the request asks for {body['model']!r}", 404)
    for field, value in body.items():
        if field not in READ and value is not None and value not in NEUTRAL.get(field, ()):
            raise RequestError(f"{field} is not computed here. Leave it out, or serve with --engine vllm")
    messages = [_message(message, number) for number, message in enumerate(body["messages"])]
    stop, number = body.get("stop") or [], body.get("n") or 1
    longest = body.get("max_completion_tokens") or body.get("max_tokens") or max_new_tokens
    given = {key: body[key] for key in ("temperature", "top_p", "top_k", "seed") if body.get(key) is not None}
    given |= {"max_new_tokens": longest, "num_return_sequences": number}
    wrong = next((k for k, v in given.items() if isinstance(v, bool) or not isinstance(v, int | float)), None)
    whole = next((k for k, v in given.items() if k not in ("temperature", "top_p") and not isinstance(v, int)), None)
    if wrong or whole:
        raise RequestError(
            f"{wrong or whole} is {given[wrong or whole or '']!r}; give a {'' if wrong else 'whole '}number"
        )
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise RequestError("stop must be a string, or a list of strings")
    stream, options = bool(body.get("stream")), body.get("stream_options")
    if stream and number > 1:
        raise RequestError("n is more than 1, and a stream has one answer. Set stream to false")
    decoding = DecodingConfig(stop_strings=stops, **given)
    record = {"messages": messages, "tools": body.get("tools")}
    return ChatRequest(record, decoding, stream, isinstance(options, dict) and bool(options.get("include_usage")))


def _message(message: Any, number: int) -> Any:
    """A message without what could name a file of this machine; images come in the request."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") != "text":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if part.keys() - {"type", "image_url"} or not str(url).startswith("data:"):
                raise RequestError(f"messages[{number}]: parts are texts, and images as data URLs in image_url")
    return {key: value for key, value in message.items() if key in MESSAGE}


class ChatServer:
    """Answers requests, one after the other.

    Args:
        module: The model.
        name: What clients call it.
        max_new_tokens: Longest answer, where a request does not say.
        key: What clients must send; None for nothing.
    """

    def __init__(self, module: AlignmentModule, name: str, max_new_tokens: int = 512, key: str | None = None) -> None:
        """Nothing is asked."""
        self.module, self.name, self.max_new_tokens, self.key = module, name, max_new_tokens, key
        self._turn = asyncio.Lock()

    def app(self, host: str) -> "Starlette":
        """The application, for a server that listens at a host.

        Raises:
            ConfigError: If Starlette is not installed.
        """
        require("starlette", "serve", "--engine vllm")
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route

        # A page of another site that has its name point here gets no answer.
        guards = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK])] if host in LOOPBACK else []
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        return Starlette(routes=routes, middleware=guards, exception_handlers={AlignmentError: _refusal})

    async def page(self, request: "Request") -> "Response":
        """A page that chats with the API below it."""
        from starlette.responses import HTMLResponse

        policy = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})

    async def health(self, request: "Request") -> "Response":
        """That it runs."""
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def models(self, request: "Request") -> "Response":
        """The one model."""
        from starlette.responses import JSONResponse

        self._check_key(request)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "lit_alignment"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: "Request") -> "Response":
        """The answer to a conversation, whole or while it is generated."""
        from starlette.responses import JSONResponse, StreamingResponse

        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError("send application/json", 415)  # what a page of another site cannot do unasked
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:
            raise RequestError("the body is not JSON") from error
        asked = read_request(body, self.name, self.max_new_tokens)
        async with self._turn:
            (item,) = await asyncio.to_thread(self.module.asked, [asked.record])
        answer = ChatAnswer(self, asked, len(item.input_ids))
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return JSONResponse(await answer.whole())

    def _check_key(self, request: "Request") -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise RequestError("the API key is missing, or wrong", 401)


async def _refusal(request: "Request", error: Exception) -> "Response":
    from starlette.responses import JSONResponse

    status = error.status if isinstance(error, RequestError) else 400
    about = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": about}, status_code=status)


class ChatAnswer:
    """The answer to one request.

    Args:
        server: Whose turn it takes.
        asked: What is asked.
        num_prompt: Tokens of the prompt.
    """

    def __init__(self, server: ChatServer, asked: ChatRequest, num_prompt: int) -> None:
        """Nothing is generated."""
        self.server, self.asked, self.num_prompt = server, asked, num_prompt
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.left = False  # whether nobody waits for it any more

    async def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        async with self.server._turn:
            (response,) = await asyncio.to_thread(self.server.module.answers, [self.asked.record], self.asked.decoding)
        completions = response.completions
        choices = [
            {"index": i, "message": {"role": "assistant", "content": each.text}, "finish_reason": each.finish_reason}
            for i, each in enumerate(completions)
        ]
        usage = self._usage(sum(each.num_tokens for each in completions))
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[str]:
        """The `chat.completion.chunk`s of a stream, as server-sent events."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_on(piece: str | None) -> None:
            if self.left:
                raise _LeftError
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def answer() -> Any:
            try:
                return self.server.module.answers([self.asked.record], self.asked.decoding, on_text=hand_on)
            except _LeftError:
                return []
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        yield self._chunk({"role": "assistant", "content": ""})
        async with self.server._turn:
            work = asyncio.create_task(asyncio.to_thread(answer))
            try:
                while (piece := await pieces.get()) is not None:
                    yield self._chunk({"content": piece})
            finally:
                self.left = True
                await asyncio.wait([work])  # the next turn begins when the model is free
        (response,) = work.result()
        (completion,) = response.completions
        yield self._chunk({}, completion.finish_reason)
        if self.asked.usage:
            usage = {"choices": [], "usage": self._usage(completion.num_tokens)}
            yield _event({**self._head("chat.completion.chunk"), **usage})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.name}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _usage(self, num_tokens: int) -> dict[str, int]:
        counts = {"prompt_tokens": self.num_prompt, "completion_tokens": num_tokens}
        return {**counts, "total_tokens": sum(counts.values())}


class _LeftError(Exception):
    """Nobody waits for an answer any more."""


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def listen(host: str, port: int) -> Any:
    """A socket that listens.

    Raises:
        ConfigError: If the address is taken, or is none of this machine.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror}). Choose another --port or --host."
        ) from error
