"""The pages of the site that are not written but made: from docstrings, signatures, results, and the notebook.

A hook of MkDocs (see mkdocs.yml). A public name, setting or method without a description ends the build, as a broken
link does.
"""

import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from lit_alignment import __version__
from lit_alignment.config_help import Setting, first_line, public_classes, settings_of

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "sft": "SFT",
    "classification": "Classification",
    "reward": "Reward",
    "preference": "Preference",
    "policy": "Policy",
    "distillation": "Distillation",
    "rag": "RAG",
    "retriever": "Retriever",
    "vlm": "VLM",
}
LOSSES = ("lit_alignment.losses", "lit_alignment.losses.preference", "lit_alignment.losses.policy")
ENGINES = (
    "lit_alignment.rollout.samplers.TransformersSampler",
    "lit_alignment.vllm.sampler.VLLMSampler",
    "lit_alignment.vllm.server_sampler.ServerSampler",
)
CALLBACKS = ["CherryPicks", "ScoredPicks", "Export", "IndexRefresh", "Throughput", "MemorySnapshot", "PredictionWriter"]
DEVICES = ["FSDP2Strategy", "DeepSpeedStrategy", "AsyncCheckpointIO", "AtomicCheckpointIO"]
OTHERS = {  # pages of the reference that are no method's: what they are, and which public names they hold
    "callbacks": ("Callbacks and loggers", [*CALLBACKS, "Upload", "ClearMLLogger"]),
    "devices": ("Strategies, checkpoints and optimizers", [*DEVICES, "MuonWithAdamW", "ScheduleFreeAdamW"]),
}
OUTSIDE = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
WIDTH = 104  # columns of a configuration
ASKED = ("from_checkpoint", "chat", "generate", "answers", "classify", "score", "embed", "retrieve")
RARELY = "---\nsearch:\n  boost: 0.2\n---\n"  # behind the guide in what a search finds
LEFT_OUT = {"LoraConfig", "__version__"}  # peft's own, and no name to describe


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Say which version the pages are of."""
    config.site_name = f"lit_alignment {__version__}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the style sheet."""
    files.append(File.generated(config, "site.css", content=(ROOT / ".site/site.css").read_text(encoding="utf-8")))
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that hold on the site as they do in a checkout: to the notebook's page, and to results."""
    markdown = re.sub(r"\((\S*tutorials/[\w-]+|[\w-]+)\.ipynb\)", r"(\1.md)", markdown)
    return markdown


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of each page that is made."""
    yield from _configuration_reference()
    yield from _api_reference()
    for name, path in OUTSIDE.items():
        yield path, f"{RARELY}{(ROOT / name).read_text(encoding='utf-8')}"
    yield "benchmarks/index.md", _benchmarks()
    for path in _results():
        yield f"benchmarks/{path.name}", f"{RARELY}{path.read_text(encoding='utf-8')}"
    for path in sorted((ROOT / "configs/tutorials").glob("*.ipynb")):
        yield f"tutorials/{path.stem}.md", notebook(json.loads(path.read_text(encoding="utf-8")))


# Configuration reference.


def _configuration_reference() -> Iterator[tuple[str, str]]:
    public = public_classes()
    for name, word in METHODS.items():
        module, data = public[f"{word}Module"], public[f"{word}DataModule"]
        parts = [f"# All settings: {word}", "", first_line(module), ""]
        parts += ["Every setting with its default; `required` has to be given. Most can be left out.", "", "```yaml"]
        for key, kind in (("model", module), ("data", data)):
            parts += [f"{key}:", f"  class_path: lit_alignment.{kind.__name__}", "  init_args:"]
            parts += _yaml(settings_of(kind), "    ", kind.__name__)
        yield f"reference/{name}.md", "\n".join([*parts, "```", ""])
    for name, (title, classes) in OTHERS.items():
        yield f"reference/{name}.md", _tables(title, [(f"lit_alignment.{each}", public[each]) for each in classes])
    rewards = importlib.import_module("lit_alignment.rollout")
    named = [(f"lit_alignment.rollout.{each}", getattr(rewards, each)) for each in rewards.__all__]
    scored = [(path, each) for path, each in named if _is_reward(each)]
    samplers = [(path, _imported(path)) for path in ENGINES]
    yield "reference/rewards.md", _tables("Rewards and samplers", [*scored, *samplers])


def _is_reward(each: Any) -> bool:
    return isinstance(each, type) and each.__name__.endswith(("Reward", "Match", "Equality"))


def _yaml(settings: Sequence[Setting], indent: str, owner: str) -> Iterator[str]:
    """The settings as lines of YAML, each below what it does."""
    for each in settings:
        if not each.text:
            raise PluginError(f"{owner}: setting '{each.key}' has no description. Add it to the class's docstring.")
        yield from textwrap.wrap(
            f"{each.text} ({each.kind})", WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        value = "required" if each.default is None else each.default
        if not each.inner:
            yield f"{indent}{each.key}: {value}"
            continue
        whole = value if value in ("null", "[]", "{}") else ""
        yield f"{indent}{each.key}: {whole and f'# {whole}, or:'}".rstrip()
        below = list(_yaml(each.inner, "", f"{owner}.{each.key}"))
        if " by name" in each.kind:
            below = ["NAME:", *(f"  {line}" for line in below)]
        elif each.kind.startswith("list of"):
            first = next(number for number, line in enumerate(below) if not line.startswith("#"))
            below = [
                *(f"  {line}" for line in below[:first]),
                f"- {below[first]}",
                *(f"  {line}" for line in below[first + 1 :]),
            ]
        yield from (f"{indent}  {line}" for line in below)


def _tables(title: str, classes: Sequence[tuple[str, Any]]) -> str:
    lines = [f"# All settings: {title}", ""]
    for path, kind in classes:
        lines += [f"## `{path}`", "", first_line(kind), ""]
        own = kind.__init__.__code__.co_varnames if "__init__" in vars(kind) else ()
        rows = []
        for each in settings_of(kind):
            if not each.text and each.key in own:
                raise PluginError(f"{path}: setting '{each.key}' has no description. Add it to the class's docstring.")
            default = "required" if each.default is None else f"`{each.default}`"
            text = each.text or f"that of `{kind.__mro__[1].__module__.partition('.')[0]}`'s own class"
            rows.append(f"| `{each.key}` | {each.kind} | {default} | {text} |".replace("\n", " "))
        head = ["| setting | type | default | meaning |", "|---|---|---|---|"] if rows else ["No settings."]
        lines += [*head, *rows, ""]
    return "\n".join(lines)


# API reference.


def _api_reference() -> Iterator[tuple[str, str]]:
    package = importlib.import_module("lit_alignment")
    places = {name: f"{place}.{name}" for name, place in vars(package)["_PLACES"].items() if name not in LEFT_OUT}
    missing = set(package.__all__) - LEFT_OUT - places.keys()
    if missing:
        raise PluginError(f"lit_alignment: public names without a page: {', '.join(sorted(missing))}.")
    groups: dict[str, list[str]] = {"modules": [], "data": [], "settings": [], "training": []}
    for name, path in sorted(places.items()):
        kind = "data" if name.endswith("DataModule") else "modules" if name.endswith("Module") else "training"
        groups["settings" if name.endswith("Config") else kind].append(path)
    groups["losses"] = [path for module in LOSSES for path in _public_of(module)]
    groups["rewards"] = [*_public_of("lit_alignment.rollout"), *ENGINES]
    groups["measuring"] = [*_public_of("lit_alignment.evaluation.answers"), *_public_of("lit_alignment.metrics")]
    groups["generation"] = [path for path in _public_of("lit_alignment.generation") if path not in places.values()]
    groups["hooks"] = _public_of("lit_alignment.hooks")
    titles = {
        "settings": "Settings",
        "training": "Callbacks, loggers, strategies, optimizers",
        "hooks": "A method of your own",
    }
    for name, paths in groups.items():
        for path in paths:
            _described(path)
        title = titles.get(name, name.capitalize())
        yield f"api/{name}.md", "\n".join([f"# {title}", "", *(_shown(path, name) for path in dict.fromkeys(paths))])


def _shown(path: str, group: str) -> str:
    """A name on its page: of a module with what a user calls, of a callback without what Lightning calls."""
    members = [name for name in ASKED if group == "modules" and hasattr(_imported(path), name)]
    if group in ("hooks", "rewards", "generation", "losses"):
        return f"::: {path}\n"
    return f"::: {path}\n    options:\n      members: {json.dumps(members)}\n      inherited_members: true\n"


def _public_of(module: str) -> list[str]:
    """Where each public name of a module is defined."""
    source = importlib.import_module(module)
    own = [
        name for name, each in vars(source).items() if getattr(each, "__module__", None) == module and name[0] != "_"
    ]
    names = getattr(source, "__all__", own)
    found = [(name, getattr(source, name)) for name in names]
    return [f"{each.__module__}.{name}" for name, each in found if inspect.isclass(each) or inspect.isfunction(each)]


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _described(path: str) -> None:
    """End the build where a public name, or a method that it adds, has no description."""
    each = _imported(path)
    if not each.__doc__ or (dataclasses.is_dataclass(each) and each.__doc__.startswith(f"{each.__name__}(")):
        raise PluginError(f"{path} has no docstring.")
    for name, method in vars(each).items() if inspect.isclass(each) else ():
        if not name.startswith("_") and inspect.isfunction(method) and not inspect.getdoc(getattr(each, name)):
            raise PluginError(f"{path}.{name} has no docstring.")


# Benchmarks and notebooks.


def _results() -> list[Path]:
    return sorted((ROOT / "benchmarks/results").glob("*.md"))


def _benchmarks() -> str:
    """The README's table, and links to what each run printed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## (Benchmarks\n.*?)(?=^## )", text, re.S | re.M)
    titles = [(path, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")) for path in _results()]
    links = [f"- [{title}]({path.name})" for path, title in titles]
    return "\n".join([f"# {section.rstrip()}".replace("](configs/", "](../"), "", "## Results", "", *links, ""])


def notebook(content: dict[str, Any]) -> str:
    """A notebook as Markdown: its texts, its code, and what it printed."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language = "console" if source.lstrip().startswith(("!", "%%bash")) else "python"
        parts.append(f"```{language}\n{source}\n```")
        texts = [_printed(output) for output in cell["outputs"]]
        if any(texts):
            parts.append("```text\n" + "".join(texts).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


def _printed(output: dict[str, Any]) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
