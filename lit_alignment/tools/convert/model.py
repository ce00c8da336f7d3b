"""Model, tokenizer, adapters and special tokens."""

import dataclasses
import re
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert.settings import Row, Settings, Table, carry

ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager")
DTYPES = ("float32", "bfloat16", "float16", "auto")
SPECIAL = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
LIGER_LOSSES = ("use_cross_entropy", "use_fused_linear_cross_entropy")
LIGER_FLAGS = ("use_rope", "use_mlp", "use_rms_norm", *LIGER_LOSSES)
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # virtual tokens before the prompt

FIRST_PIECE = (
    "a reference of several tokens gave only its first one there; here a new token begins as the mean of them all"
)
BOTH_TABLES = (
    "there only Llama's input embedding was set, its output embedding was not, and most architectures were left as "
    "they were without a word; here both are set for all"
)
ROWS_TRAIN = (
    "under LoRA the rows of new tokens stayed there as they began, without modules_to_save; here these rows train, and "
    "no others"
)
NO_ROWS = "vectors before the tokens cannot train rows of new tokens; take a tokenizer that has them, or LoRA"
LIGER = "its kernels were never switched on there, since the package was looked for under a wrong name; here they are"
LIGER_LOSS = "the loss stays ours, which also needs no table of all logits"
NO_LENGTH = "prefix tuning could not be used there: it had no num_virtual_tokens; here there are 32"
INIT_TEXT = "there the text came without its tokenizer and had no effect; here the vectors begin with it"
NO_WIDTH = "P-tuning could not be used there: its encoder had no width; here encoder_hidden_size is 256"
FROZEN = "false or not set, so nothing could train there; here the adapter is trainable"
ON_CPU = "it needs a GPU, and this run is on the CPU"
NO_ADAPTER = "quantised weights cannot train; add peft_settings (QLoRA), or leave it out"

UNUSED: Table = {
    "transformers_settings.low_cpu_mem_usage": "weights are always loaded piece by piece",
    "transformers_settings.omit_base_model_save": "checkpoints hold what was trained and nothing else",
    "resize_token_embeddings": "the embeddings grow by themselves where the tokenizer has more tokens",
}
KEYWORDS: Table = {
    "revision": Row(str),
    "use_cache, return_dict, device_map": "set by the module itself",
    "num_labels, problem_type, id2label, label2id": "the module's labels tell them",
}
TOKENIZER: Table = {
    "use_fast": "a fast tokenizer is always used; a slow one could split some texts otherwise",
    "tokenizer_kwargs": "tokenizers are loaded with their own settings",
}
TOKENS: Table = {f"{role}_token": Row(str, role) for role in ("bos", "eos", "pad", "unk", "sep")}
# The class of peft for each old name, and its keys with their old defaults.
ADAPTERS: dict[str, tuple[str, Table]] = {
    "LORA": ("LoraConfig", {"r": Row(16), "lora_alpha": Row(16), "lora_dropout": Row(0.05), "bias": Row("none")}),
    "PREFIX_TUNING": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": Row(32), "encoder_hidden_size": Row(int), "prefix_projection": Row(bool)},
    ),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": Row(32)}),
    "P_TUNING": (
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": Row(32),
            "encoder_reparameterization_type": Row(str),
            "encoder_hidden_size": Row(256),
        },
    ),
}


def backbone(model: Settings, tokenizer: Settings, scores: bool = False) -> dict[str, Any]:
    """Our `model.backbone`.

    Args:
        model: The old model settings.
        tokenizer: The old tokenizer settings.
        scores: Whether it is of a classifier or reward model.
    """
    ours: dict[str, Any] = {"path": model.need("model_path")}
    _check_type(model, scores)
    tokenizer_path = tokenizer.maybe("tokenizer_path", str)
    if tokenizer_path not in (None, ours["path"]):
        ours["tokenizer"] = tokenizer_path
    carry(tokenizer, TOKENIZER)
    how = model.part("transformers_settings")
    dtype = how.take("torch_dtype", "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{how.path_of('torch_dtype')} is '{dtype}'; ours are {', '.join(DTYPES)}.")
    ours["dtype"] = dtype
    if how.take("trust_remote_code", False) | tokenizer.take("trust_remote_code", False):
        ours["trust_remote_code"] = True
    if how.take("load_in_8bit", False):
        if "peft_settings" in model or "adapter_path" in model:
            ours["quantization"] = "int8"
        else:
            how.leave_out(NO_ADAPTER, "load_in_8bit")
    carry(model, UNUSED)
    keywords = model.part("model_kwargs")
    attention = keywords.maybe("attn_implementation", str)
    if attention in ATTENTION:
        ours["attention"] = attention
    elif attention is not None:
        text = f"'{attention}' is not among ours ({', '.join(ATTENTION)}); the best one is chosen"
        keywords.leave_out(text, "attn_implementation")
    return ours | carry(keywords, KEYWORDS) | _liger(model.part("liger_kernels_settings"))


def _check_type(model: Settings, scores: bool) -> None:
    kind = model.take("model_type", "seq_cls" if scores else "causal")
    base = kind.removesuffix("_with_ulysses")
    if kind != base:
        model.leave_out("sequence parallelism is not there yet", "model_type")
    if scores and not base.startswith("seq_cls"):
        model.leave_out("a layer of scores is put on any decoder", "model_type", shown=f" '{kind}'")
    elif not scores and base not in ("causal", "gemma", "qwen", "qwen3"):
        raise ConfigError(f"{model.path_of('model_type')} is '{kind}': only causal models can be converted here.")


def _liger(old: Settings) -> dict[str, Any]:
    wanted = [flag for flag in LIGER_FLAGS if old.take(flag, False)]
    if not wanted:
        return {}
    old.warn(LIGER, ours="model.backbone.liger")
    old.leave_out(LIGER_LOSS, *[flag for flag in LIGER_LOSSES if flag in wanted])
    return {"liger": True}


def trained_dtype(model: Settings, base: dict[str, Any], found: dict[str, Any]) -> str:
    """The precision of the weights that train: adapters are float32, and whole layers beside them are as the base.

    Args:
        model: The old model settings.
        base: Our backbone.
        found: Our adapters.
    """
    whole = not found or ("peft_settings" in model and _saved_modules(model))
    return str(base["dtype"]) if whole else "float32"


def adapters(model: Settings, training: bool) -> dict[str, Any]:
    """Our `peft` or `adapter`, or nothing where all weights train."""
    path = model.maybe("adapter_path", str)
    if path is None:
        return {"peft": _peft(model)} if "peft_settings" in model else {}
    if not training:
        model.leave_out("nothing is trained", "is_trainable")
    elif not model.take("is_trainable", False):
        model.warn(FROZEN, "is_trainable", "model.adapter.trainable")
    return {"adapter": {"path": path, "trainable": training}}


def adapter_kind(model: Settings) -> str:
    """The old name of the adapters to add, or "" where there are none."""
    if "peft_settings" not in model:
        return ""
    old = model.part("peft_settings")
    return old.take("name", "PROMPT_TUNING" if "num_virtual_tokens" in old else "LORA").upper()


def _peft(model: Settings) -> dict[str, Any]:
    kind, old = adapter_kind(model), model.part("peft_settings")
    if kind not in ADAPTERS:
        raise ConfigError(f"{old.path_of('name')} is '{kind}'; turbo-alignment has {', '.join(ADAPTERS)}.")
    class_name, table = ADAPTERS[kind]
    nested = "config" in old  # the newest form, which hands everything to peft's own class, with its defaults
    settings = old.part("config") if nested else old
    ours = carry(settings, {} if nested and kind == "LORA" else table)
    if kind == "LORA":
        targets = settings.raw("target_modules")
        if targets is not None or not nested:
            ours["target_modules"] = targets or ["q_proj", "v_proj"]
        if (saved := settings.raw("modules_to_save")) is not None:
            ours["modules_to_save"] = saved
    if kind == "PREFIX_TUNING" and "num_virtual_tokens" not in settings:
        settings.warn(NO_LENGTH, ours="model.peft.num_virtual_tokens")
    if kind == "P_TUNING" and "encoder_hidden_size" not in settings:
        settings.warn(NO_WIDTH, ours="model.peft.encoder_hidden_size")
    if kind == "PROMPT_TUNING" and (text := settings.maybe("prompt_tuning_init_text", str)) is not None:
        ours |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
        ours["tokenizer_name_or_path"] = model.need("model_path")
        settings.warn(INIT_TEXT, "prompt_tuning_init_text")
    if nested:
        ours |= _rest(settings, kind)
    ours["task_type"] = settings.take("task_type", "CAUSAL_LM")
    return {"class_path": f"peft.{class_name}", "init_args": ours}


def _saved_modules(model: Settings) -> bool:
    old = model.part("peft_settings")
    return bool((old.part("config") if "config" in old else old).raw("modules_to_save"))


def _rest(old: Settings, kind: str) -> dict[str, Any]:
    """What else peft's own class takes."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} - {"peft_type"}
    old.leave_out("it follows from the class", "peft_type")
    unread = {path.rpartition(".")[2] for path in old.unread()}
    return carry(old, {key: Row(object) for key in old.values if key in names & unread})


def tokens(special: Settings, model: Settings) -> dict[str, Any]:
    """Our `model.tokens`.

    A reference that looks like one special token, `<s>` or `[SEP]`, is copied; any other is a text whose tokens'
    rows are averaged.
    """
    ours = carry(special, TOKENS)
    key = "embeddings_initialization_strategy"
    references: dict[str, Any] = model.maybe(key, dict) or {}
    kind = adapter_kind(model)
    if kind in PROMPT_LEARNING:
        model.leave_out(NO_ROWS, key)
        return ours
    new = {}
    for token, reference in references.items():
        if not isinstance(reference, str):
            raise ConfigError(f"{model.path_of(key)}: the reference of '{token}' is {reference!r}; give a text.")
        copied = SPECIAL.fullmatch(reference) is not None
        new[token] = {"init": "copy" if copied else "text", "of": reference}
        if not copied:
            model.warn(FIRST_PIECE, f"{key}.{token}", "model.tokens.new")
    if new:
        ours["new"] = new
        model.warn(BOTH_TABLES, key, "model.tokens.new")
        if kind == "LORA" and not _saved_modules(model):
            model.warn(ROWS_TRAIN, key, "model.tokens.new")
    return ours
