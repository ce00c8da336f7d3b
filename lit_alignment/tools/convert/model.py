"""Model, tokenizer, adapters and special tokens."""

import re
from dataclasses import fields
from typing import Any

from lit_alignment.errors import ConfigError
from lit_alignment.tools.convert.settings import Row, Settings, Table, carry

ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "eager")
DTYPES = ("float32", "bfloat16", "float16", "auto")
SPECIAL = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
LIGER_LOSSES = ("use_cross_entropy", "use_fused_linear_cross_entropy")
LIGER_FLAGS = ("use_rope", "use_mlp", "use_rms_norm", *LIGER_LOSSES)

FIRST_PIECE = """a reference of several tokens gave only its first one there; here a new token begins as the mean of \
them all"""
BOTH_TABLES = """there only Llama's input embedding was set, its output embedding was not, and most architectures were \
left as they were without a word; here both are set for all"""
ROWS_TRAIN = """under LoRA the rows of new tokens stayed there as they began, without modules_to_save; here these rows \
train, and no others"""
NO_ROWS = "virtual tokens before the prompt cannot train rows of new tokens; take a tokenizer that has them, or LoRA"
LIGER = "its kernels were never switched on there, since the package was looked for under a wrong name; here they are"
LIGER_LOSS = "the loss stays ours, which also needs no table of all logits"
NO_LENGTH = "prefix tuning could not be used there: it had no num_virtual_tokens; here there are 32"
INIT_TEXT = "there the text came without its tokenizer and had no effect; here the vectors begin with it"
NO_WIDTH = "P-tuning could not be used there: its encoder had no width; here encoder_hidden_size is 256"
FROZEN = "false or not set, so nothing could train there; here the adapter is trainable"
ON_CPU = "it needs a GPU, and this run is on the CPU"
NO_ADAPTER = "quantised weights cannot train; add peft_settings (QLoRA), or leave it out"

TOKENIZER: Table = {
    "use_fast": "a fast tokenizer is always used; a slow one could split some texts otherwise",
    "tokenizer_kwargs": "tokenizers are loaded with their own settings",
}
MODEL: Table = {
    "transformers_settings.low_cpu_mem_usage": "weights are always loaded piece by piece",
    "transformers_settings.omit_base_model_save": "checkpoints hold what was trained and nothing else",
    "resize_token_embeddings": "the embeddings grow by themselves where the tokenizer has more tokens",
}
KEYWORDS: Table = {
    "revision": Row(str),
    "use_cache, return_dict, device_map": "set by the module itself",
    "num_labels, problem_type, id2label, label2id": "the module's labels tell them",
}
GPU_ONLY = {"liger": "liger_kernels_settings", "quantization": "transformers_settings.load_in_8bit"}
GPU_ONLY |= {"attention": "model_kwargs.attn_implementation"}
TOKENS: Table = {f"{role}_token": Row(str, role) for role in ("bos", "eos", "pad", "unk", "sep")}
LORA: Table = {"r": Row(16), "lora_alpha": Row(16), "lora_dropout": Row(0.05), "bias": Row("none")}
VIRTUAL = {"num_virtual_tokens": Row(32)}
PREFIX: Table = {**VIRTUAL, "encoder_hidden_size": Row(int), "prefix_projection": Row(bool)}
ENCODED: Table = {**VIRTUAL, "encoder_reparameterization_type": Row(str), "encoder_hidden_size": Row(256)}
# For the old name of an adapter: the class of peft, and its keys.
ADAPTERS: dict[str, tuple[str, Table]] = {
    "LORA": ("LoraConfig", LORA),
    "PREFIX_TUNING": ("PrefixTuningConfig", PREFIX),
    "PROMPT_TUNING": ("PromptTuningConfig", VIRTUAL),
    "P_TUNING": ("PromptEncoderConfig", ENCODED),
}


def backbone(model: Settings, tokenizer: Settings, scores: bool = False) -> dict[str, Any]:
    """Our `model.backbone`, of a classifier or reward model if it `scores`."""
    ours: dict[str, Any] = {"path": model.need("model_path")}
    kind = model.take("model_type", "seq_cls" if scores else "causal")
    base = kind.removesuffix("_with_ulysses")
    model.leave_out("sequence parallelism is not there yet", "model_type", when=kind != base)
    other = scores and not base.startswith("seq_cls")
    model.leave_out(
        "a scalar or classification head is put on any decoder", "model_type", when=other, shown=f" '{kind}'"
    )
    if not scores and base not in ("causal", "gemma", "qwen", "qwen3"):
        raise ConfigError(f"{model.path_of('model_type')} is '{kind}': only causal models can be converted here.")
    if (path := tokenizer.take("tokenizer_path", ours["path"])) != ours["path"]:
        ours["tokenizer"] = path
    carry(tokenizer, TOKENIZER)
    how, keywords = model.part("transformers_settings"), model.part("model_kwargs")
    ours["dtype"] = how.take("torch_dtype", "bfloat16").removeprefix("torch.")
    if ours["dtype"] not in DTYPES:
        raise ConfigError(f"{how.path_of('torch_dtype')} is '{ours['dtype']}'; ours are {', '.join(DTYPES)}.")
    if how.take("trust_remote_code", False) | tokenizer.take("trust_remote_code", False):
        ours["trust_remote_code"] = True
    trained = "peft_settings" in model or "adapter_path" in model
    if how.take("load_in_8bit", False) and trained:
        ours["quantization"] = "int8"
    how.leave_out(NO_ADAPTER, "load_in_8bit", when=how.take("load_in_8bit", False) and not trained)
    carry(model, MODEL)
    if (attention := keywords.maybe("attn_implementation", str)) in ATTENTION:
        ours["attention"] = attention
    else:
        text = f"'{attention}' is not among ours ({', '.join(ATTENTION)}); the best one is chosen"
        keywords.leave_out(text, "attn_implementation")
    ours |= carry(keywords, KEYWORDS)
    liger = model.part("liger_kernels_settings")
    if wanted := [flag for flag in LIGER_FLAGS if liger.take(flag, False)]:
        ours["liger"] = True
        liger.warn(LIGER, ours="model.backbone.liger")
        liger.leave_out(LIGER_LOSS, *[flag for flag in LIGER_LOSSES if flag in wanted])
    return ours


def leave_gpu(model: Settings, base: dict[str, Any]) -> None:
    """Take out of a backbone what only a GPU has."""
    for name, key in GPU_ONLY.items():
        if base.get(name) not in (None, "sdpa", "eager"):
            model.leave_out(ON_CPU, key, shown=f" '{base[name]}'" if name == "attention" else "")
            del base[name]


def adapters(model: Settings, training: bool) -> dict[str, Any]:
    """Our `peft` or `adapter`, or nothing where all weights train."""
    path = model.maybe("adapter_path", str)
    if path is None:
        return {"peft": _peft(model)} if "peft_settings" in model else {}
    model.leave_out("nothing is trained", "is_trainable", when=not training)
    frozen = training and not model.take("is_trainable", False)
    model.warn(FROZEN, "is_trainable", "model.adapter.trainable", when=frozen)
    return {"adapter": {"path": path, "trainable": training}}


def _peft(model: Settings) -> dict[str, Any]:
    old = model.part("peft_settings")
    kind = old.take("name", "PROMPT_TUNING" if "num_virtual_tokens" in old else "LORA").upper()
    if kind not in ADAPTERS:
        raise ConfigError(f"{old.path_of('name')} is '{kind}'; turbo-alignment has {', '.join(ADAPTERS)}.")
    nested = "config" in old  # the newest form, which hands everything to peft's own class, with its defaults
    old = old.part("config") if nested else old
    name, table = ADAPTERS[kind]
    ours = carry(old, {} if nested and kind == "LORA" else table)
    if kind == "LORA":
        ours |= carry(old, {"target_modules": Row(object), "modules_to_save": Row(object)})
        ours |= {} if nested or ours.get("target_modules") else {"target_modules": ["q_proj", "v_proj"]}
    unset = kind == "PREFIX_TUNING" and "num_virtual_tokens" not in old
    old.warn(NO_LENGTH, ours="model.peft.num_virtual_tokens", when=unset)
    unset = kind == "P_TUNING" and "encoder_hidden_size" not in old
    old.warn(NO_WIDTH, ours="model.peft.encoder_hidden_size", when=unset)
    if kind == "PROMPT_TUNING" and (text := old.maybe("prompt_tuning_init_text", str)) is not None:
        ours |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
        ours["tokenizer_name_or_path"] = model.need("model_path")
        old.warn(INIT_TEXT, "prompt_tuning_init_text")
    task = {"task_type": old.take("task_type", "CAUSAL_LM")}
    if nested:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        old.leave_out("it follows from the class", "peft_type")
        known = {each.name for each in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} - {"peft_type", "task_type"}
        ours |= carry(old, {key: Row(object) for key in old.values if key in known})
    return {"class_path": f"peft.{name}", "init_args": ours | task}


def tokens(special: Settings, model: Settings, peft: dict[str, Any]) -> dict[str, Any]:
    """Our `model.tokens`; a reference like `<s>` or `[SEP]` is copied, the tokens' rows of any other are averaged."""
    ours, key = carry(special, TOKENS), "embeddings_initialization_strategy"
    references: dict[str, Any] = model.maybe(key, dict) or {}
    lora = peft.get("class_path") == "peft.LoraConfig"
    if peft and not lora:
        model.leave_out(NO_ROWS, key)
        return ours
    new = {}
    for token, reference in references.items():
        if not isinstance(reference, str):
            raise ConfigError(f"{model.path_of(key)}: the reference of '{token}' is {reference!r}; give a text.")
        copied = SPECIAL.fullmatch(reference) is not None
        new[token] = {"init": "copy" if copied else "text", "of": reference}
        model.warn(FIRST_PIECE, f"{key}.{token}", "model.tokens.new", when=not copied)
    if not new:
        return ours
    model.warn(BOTH_TABLES, key, "model.tokens.new")
    model.warn(ROWS_TRAIN, key, "model.tokens.new", when=lora and not peft["init_args"].get("modules_to_save"))
    return ours | {"new": new}
