"""`serve --engine transformers`: OpenAI's API with the answers of predict, and a page that chats in a browser."""

import re
import shutil
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from lit_alignment import DecodingConfig, SFTModule
from lit_alignment.cli import main
from lit_alignment.errors import ConfigError
from lit_alignment.tools.chat_server import PAGE, ChatServer, RequestError, listen, read_request
from tests.helpers import base_model_folder

ASKED = [{"role": "user", "content": "the scale"}]
# As root, and where no network is.
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "base"
    return SFTModule.from_checkpoint(base_model_folder(folder, initializer_range=0.3, max_position_embeddings=128))


@contextmanager
def serving(module, **settings):
    """The address of a server."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(ChatServer(module, "tiny", **settings).app("127.0.0.1"), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def client(address, key="none"):
    import openai

    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def test_answers_of_the_api_are_those_of_the_module(module):
    ten = DecodingConfig(max_new_tokens=10)
    sampled = DecodingConfig(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=3, num_return_sequences=2)
    expected, several = module.answers([ASKED], ten)[0].completions[0], module.answers([ASKED], sampled)[0].completions
    with serving(module) as address:
        api = client(address).chat.completions
        assert [model.id for model in client(address).models.list()] == ["tiny"]
        found = api.create(model="tiny", messages=ASKED, max_tokens=10)
        assert found.choices[0].message.content == expected.text
        assert found.choices[0].finish_reason == expected.finish_reason
        length = len(module.asked([ASKED])[0].input_ids)
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (length, expected.num_tokens)
        drawn = api.create(model="tiny", messages=ASKED, max_tokens=10, temperature=1.0, top_p=0.9, seed=3, n=2)
        assert [choice.message.content for choice in drawn.choices] == [each.text for each in several]
        stop = expected.text[4:7]
        assert (
            api.create(model="tiny", messages=ASKED, max_tokens=10, stop=stop).choices[0].message.content
            == (expected.text[:4])
        )


def test_stream_comes_in_pieces_that_are_the_answer(module):
    expected = module.chat(ASKED, DecodingConfig(max_new_tokens=20))
    with serving(module) as address:
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 20}
        chunks = list(client(address).chat.completions.create(model="tiny", messages=ASKED, **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected and len(pieces) > 8
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 20


def test_client_that_leaves_frees_the_model_for_the_next(module):
    with serving(module) as address:
        api = client(address).chat.completions
        stream = api.create(model="tiny", messages=ASKED, stream=True, max_tokens=100, stop=["never said"])
        next(iter(stream))
        stream.close()
        begin = time.perf_counter()
        assert api.create(model="tiny", messages=ASKED, max_tokens=2).choices[0].message.content is not None
        assert time.perf_counter() - begin < 10


def test_what_is_wrong_with_a_request_is_told(module):
    import openai

    with serving(module, key="secret") as address:
        api = client(address, "secret").chat.completions
        with pytest.raises(openai.AuthenticationError, match="API key is missing, or wrong"):
            client(address).chat.completions.create(model="tiny", messages=ASKED)
        with pytest.raises(openai.NotFoundError, match="is called 'tiny' here"):
            api.create(model="other", messages=ASKED)
        with pytest.raises(openai.BadRequestError, match="tokens, and the model 128 positions"):
            api.create(model="tiny", messages=[{"role": "user", "content": "order " * 300}])
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\].role"):
            api.create(model="tiny", messages=[{"role": "robot", "content": "a"}])
        with pytest.raises(openai.BadRequestError, match="temperature is -1"):
            api.create(model="tiny", messages=ASKED, temperature=-1)


def test_pages_of_other_sites_get_no_answer(module):
    import httpx

    with serving(module) as address:
        body = '{"messages": [{"role": "user", "content": "a"}]}'
        plain = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
        assert plain.status_code == 415  # what needs no leave of a browser
        assert httpx.get(address, headers={"host": "elsewhere.example"}).status_code == 400
        page = httpx.get(address)
        assert page.status_code == 200 and "connect-src 'self'" in page.headers["content-security-policy"]
        assert "access-control-allow-origin" not in page.headers


def test_page_needs_no_other_host():
    assert not re.search(r"https?://|//[a-z]|@import|url\(", PAGE.read_text().replace("// What", ""))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"messages": "hello"}, "give {model, messages"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not computed here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not computed"),
        ({"max_tokens": "10"}, "max_new_tokens is '10'; give a number"),
        ({"max_tokens": 1.5}, "max_new_tokens is 1.5; give a whole number"),
        ({"temperature": True}, "temperature is True"),
        ({"stop": [1]}, "stop must be"),
        ({"n": 2, "stream": True}, "n is more than 1"),
        ({"n": 2}, "2 answers to a prompt need temperature above 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}, "data URLs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
            "data URLs",
        ),
    ],
)
def test_request_that_is_not_computed_is_refused(changes, problem):
    with pytest.raises((RequestError, ConfigError), match=problem):
        read_request({"messages": ASKED, **changes}, "tiny", 10)


def test_request_names_no_file_of_this_machine():
    message = {"role": "user", "content": "a", "images": ["/etc/passwd"], "type": "image", "train": True}
    asked = read_request({"messages": [message], "frequency_penalty": 0}, "tiny", 10)
    assert asked.record == {"messages": [{"role": "user", "content": "a"}], "tools": None}
    with pytest.raises(RequestError, match="image is not computed"):
        read_request({"messages": [message], "image": "/etc/passwd"}, "tiny", 10)


def test_missing_package_and_taken_port_are_told(module, monkeypatch, capsys):
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "uvicorn", None)
        assert main(["serve", "none", "--engine", "transformers"]) == 2
    said = capsys.readouterr().err
    assert "uvicorn is not installed. Run: pip install 'lit-alignment[serve]', or use --engine vllm" in said
    assert main(["serve", "none", "--engine", "transformers", "--max-model-len", "9"]) == 2
    assert "unrecognized arguments: --max-model-len" in capsys.readouterr().err
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"cannot listen at .*in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_page_chats_in_a_browser(module):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    twenty = DecodingConfig(max_new_tokens=20)
    first = module.chat([{"role": "system", "content": "be kind"}, *ASKED], twenty)
    expect, printed = playwright.expect, lambda text: re.sub(r"\s+", " ", text).strip()
    with serving(module, key="secret") as address, playwright.sync_playwright() as running:
        window = running.chromium.launch(executable_path=browser, args=CHROMIUM)
        page = window.new_page(viewport={"width": 360, "height": 640})
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.goto(address)
        expect(page.get_by_text("the API key is missing, or wrong")).to_be_visible()
        page.fill("#key", "secret")
        page.locator("#key").blur()
        expect(page).to_have_title("tiny")
        page.fill("#system", "be kind")
        page.fill("#longest", "20")
        page.fill("#text", "the scale")
        page.keyboard.press("Enter")
        expect(page.locator("#send")).to_have_text("Send")
        expect(page.get_by_text("Cut: the longest answer")).to_be_visible()
        assert printed(page.locator(".assistant").text_content()) == printed(first)
        page.fill("#text", "order " * 200)
        page.click("#send")
        expect(page.get_by_text("and the model 128 positions")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_text("New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        assert not problems
        window.close()
