"""Model, tokenizer, adapters and special tokens."""

import dataclasses
import re
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert.settings import Settings, shorten

ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager")
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "auto": "auto"}
SPECIAL = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
LIGER_FLAGS = ("use_rope", "use_mlp", "use_rms_norm", "use_cross_entropy", "use_fused_linear_cross_entropy")
ADAPTERS = {
    "LORA": "LoraConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
}

PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # vectors before the tokens

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


def backbone(model: Settings, tokenizer: Settings, scores: bool = False) -> dict[str, Any]:
    """Our `model.backbone`.

    Args:
        model: The old model settings.
        tokenizer: The old tokenizer settings.
        scores: Whether it is of a classifier or reward model.
    """
    notes = model.notes
    path = model.need("model_path", str)
    ours: dict[str, Any] = {"path": path}
    _check_type(model, scores)
    tokenizer_path = tokenizer.maybe("tokenizer_path", str)
    if tokenizer_path is not None and tokenizer_path != path:
        ours["tokenizer"] = tokenizer_path
    tokenizer.leave_out("a fast tokenizer is always used; a slow one could split some texts otherwise", "use_fast")
    tokenizer.leave_out("tokenizers are loaded with their own settings", "tokenizer_kwargs")

    how = model.part("transformers_settings")
    dtype = how.take("torch_dtype", "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{how.path_of('torch_dtype')} is '{dtype}'; ours are {', '.join(DTYPES)}.")
    ours["dtype"] = dtype
    trusted = [each.take("trust_remote_code", False) for each in (how, tokenizer)]
    if any(trusted):
        ours["trust_remote_code"] = True
    if how.take("load_in_8bit", False):
        if "peft_settings" in model or "adapter_path" in model:
            ours["quantization"] = "int8"
        else:
            notes.leave_out(how.path_of("load_in_8bit"), NO_ADAPTER)
    how.leave_out("weights are always loaded piece by piece", "low_cpu_mem_usage")
    how.leave_out("checkpoints hold what was trained and nothing else", "omit_base_model_save")
    model.leave_out("the embeddings grow by themselves where the tokenizer has more tokens", "resize_token_embeddings")
    ours |= _keywords(model.part("model_kwargs"))
    ours |= _liger(model.part("liger_kernels_settings"))
    return ours


def trained_dtype(model: Settings, base: dict[str, Any], found: dict[str, Any]) -> str:
    """The precision of the weights that train: adapters are float32, and whole layers beside them are as the base.

    Args:
        model: The old model settings.
        base: Our backbone.
        found: Our adapters.
    """
    whole = not found or ("peft_settings" in model and _saved_modules(model))
    return str(base["dtype"]) if whole else "float32"


def leave_gpu(model: Settings, base: dict[str, Any]) -> None:
    """Take out of a backbone what only a GPU has."""
    kernels, how = model.part("liger_kernels_settings"), model.part("transformers_settings")
    attention = model.part("model_kwargs").path_of("attn_implementation")
    if base.pop("liger", False):
        model.notes.leave_out(f"{kernels.path} {shorten(kernels.values)}", ON_CPU)
    if base.pop("quantization", None):
        model.notes.leave_out(how.path_of("load_in_8bit"), ON_CPU)
    if base.get("attention") not in (None, "sdpa", "eager"):
        model.notes.leave_out(f"{attention} '{base.pop('attention')}'", ON_CPU)


def _check_type(model: Settings, scores: bool) -> None:
    kind = model.take("model_type", "seq_cls" if scores else "causal")
    base = kind.removesuffix("_with_ulysses")
    if kind != base:
        model.notes.leave_out(model.path_of("model_type"), "sequence parallelism is not there yet")
    if scores and not base.startswith("seq_cls"):
        model.notes.leave_out(f"{model.path_of('model_type')} '{kind}'", "a layer of scores is put on any decoder")
    elif not scores and base not in ("causal", "gemma", "qwen", "qwen3"):
        raise ConfigError(f"{model.path_of('model_type')} is '{kind}': only causal models can be converted here.")


def _keywords(old: Settings) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    attention = old.maybe("attn_implementation", str)
    if attention in ATTENTION:
        ours["attention"] = attention
    elif attention is not None:
        text = f"'{attention}' is not among ours ({', '.join(ATTENTION)}); the best one is chosen"
        old.notes.leave_out(old.path_of("attn_implementation"), text)
    revision = old.maybe("revision", str)
    if revision is not None:
        ours["revision"] = revision
    old.leave_out("set by the module itself", "use_cache", "return_dict", "device_map")
    old.leave_out("the module's labels tell them", "num_labels", "problem_type", "id2label", "label2id")
    return ours


def labels(model: Settings) -> list[str]:
    """Names of a classifier's labels: those of id2label, else numbers; two where nothing is said, as there."""
    old = model.part("model_kwargs")
    names: dict[str, Any] = old.maybe("id2label", dict) or {}
    if names and all(isinstance(name, str) for name in names.values()):
        return [names[key] for key in sorted(names, key=lambda key: (len(key), key))]
    number = old.take("num_labels", 2)
    if number < 2:
        raise ConfigError(f"{old.path_of('num_labels')} is {number}; a classifier has two or more.")
    return [str(index) for index in range(number)]


def _liger(old: Settings) -> dict[str, Any]:
    wanted = [old.take(flag, False) for flag in LIGER_FLAGS]
    if not any(wanted):
        return {}
    old.notes.warn(f"{old.path} -> model.backbone.liger", LIGER)
    for flag in LIGER_FLAGS[3:]:
        if old.take(flag, False):
            old.notes.leave_out(old.path_of(flag), LIGER_LOSS)
    return {"liger": True}


def adapters(model: Settings, training: bool) -> dict[str, Any]:
    """Our `peft` or `adapter`, or nothing where all weights train."""
    path = model.maybe("adapter_path", str)
    if path is None:
        return {"peft": _peft(model)} if "peft_settings" in model else {}
    if not training:
        model.leave_out("nothing is trained", "is_trainable")
    elif not model.take("is_trainable", False):
        model.notes.warn(f"{model.path_of('is_trainable')} -> model.adapter.trainable", FROZEN)
    return {"adapter": {"path": path, "trainable": training}}


def adapter_kind(model: Settings) -> str:
    """The old name of the adapters to add, or "" where there are none."""
    if "peft_settings" not in model:
        return ""
    old = model.part("peft_settings")
    return old.take("name", "PROMPT_TUNING" if "num_virtual_tokens" in old else "LORA").upper()


def _peft(model: Settings) -> dict[str, Any]:
    kind = adapter_kind(model)
    old = model.part("peft_settings")
    if kind not in ADAPTERS:
        raise ConfigError(f"{old.path_of('name')} is '{kind}'; turbo-alignment has {', '.join(ADAPTERS)}.")
    nested = "config" in old
    settings = old.part("config") if nested else old
    ours: dict[str, Any] = {}
    match kind:
        case "LORA":
            defaults = {} if nested else {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"}
            ours |= {key: settings.take(key, default) for key, default in defaults.items()}
            targets = settings.raw("target_modules")
            if targets is not None or not nested:
                ours["target_modules"] = targets or ["q_proj", "v_proj"]
            if (saved := settings.raw("modules_to_save")) is not None:
                ours["modules_to_save"] = saved
        case "PREFIX_TUNING":
            ours["num_virtual_tokens"] = settings.take("num_virtual_tokens", 32)
            ours |= _given(settings, "encoder_hidden_size", "prefix_projection")
            if "num_virtual_tokens" not in settings:
                model.notes.warn(f"{settings.path} -> model.peft.num_virtual_tokens", NO_LENGTH)
        case "PROMPT_TUNING":
            ours["num_virtual_tokens"] = settings.take("num_virtual_tokens", 32)
            if (text := settings.maybe("prompt_tuning_init_text", str)) is not None:
                ours |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
                ours["tokenizer_name_or_path"] = model.need("model_path", str)
                model.notes.warn(settings.path_of("prompt_tuning_init_text"), INIT_TEXT)
        case "P_TUNING":
            ours["num_virtual_tokens"] = settings.take("num_virtual_tokens", 32)
            ours |= _given(settings, "encoder_reparameterization_type")
            ours["encoder_hidden_size"] = settings.take("encoder_hidden_size", 256)
            if "encoder_hidden_size" not in settings:
                model.notes.warn(f"{settings.path} -> model.peft.encoder_hidden_size", NO_WIDTH)
    if nested:
        ours |= _rest(settings, ADAPTERS[kind])
    ours["task_type"] = settings.take("task_type", "CAUSAL_LM")
    return {"class_path": f"peft.{ADAPTERS[kind]}", "init_args": ours}


def _saved_modules(model: Settings) -> bool:
    old = model.part("peft_settings")
    return bool((old.part("config") if "config" in old else old).raw("modules_to_save"))


def _given(old: Settings, *keys: str) -> dict[str, Any]:
    return {key: old.raw(key) for key in keys if old.values.get(key) is not None}


def _rest(old: Settings, name: str) -> dict[str, Any]:
    """What else peft's own class takes; the newest form of the old settings passes all of it on."""
    import peft

    classes = {
        "LoraConfig": peft.LoraConfig,
        "PrefixTuningConfig": peft.PrefixTuningConfig,
        "PromptTuningConfig": peft.PromptTuningConfig,
        "PromptEncoderConfig": peft.PromptEncoderConfig,
    }
    names = {field.name for field in dataclasses.fields(classes[name])} - {"peft_type"}
    old.leave_out("it follows from the class", "peft_type")
    unread = {path.rpartition(".")[2] for path in old.unread()}
    return _given(old, *[key for key in old.values if key in names & unread])


def tokens(special: Settings, model: Settings) -> dict[str, Any]:
    """Our `model.tokens`.

    A reference that looks like one special token, `<s>` or `[SEP]`, is copied; any other is a text whose tokens'
    rows are averaged.
    """
    roles = ("bos", "eos", "pad", "unk", "sep")
    ours: dict[str, Any] = {role: value for role in roles if (value := special.maybe(f"{role}_token", str)) is not None}
    references: dict[str, Any] = model.maybe("embeddings_initialization_strategy", dict) or {}
    key = model.path_of("embeddings_initialization_strategy")
    kind = adapter_kind(model)
    if kind in PROMPT_LEARNING:
        model.leave_out(NO_ROWS, "embeddings_initialization_strategy")
        return ours
    new = {}
    for token, reference in references.items():
        if not isinstance(reference, str):
            raise ConfigError(f"{key}: the reference of '{token}' is {reference!r}; give a text.")
        copied = SPECIAL.fullmatch(reference) is not None
        new[token] = {"init": "copy" if copied else "text", "of": reference}
        if not copied:
            model.notes.warn(f"{key}.{token} -> model.tokens.new", FIRST_PIECE)
    if new:
        ours["new"] = new
        model.notes.warn(f"{key} -> model.tokens.new", BOTH_TABLES)
        if kind == "LORA" and not _saved_modules(model):
            model.notes.warn(f"{key} -> model.tokens.new", ROWS_TRAIN)
    return ours
