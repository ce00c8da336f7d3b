"""merge_adapters_to_base: an adapter merged into its base."""

from lit_alignment.tools.convert.document import Document, script
from lit_alignment.tools.convert.model import backbone
from lit_alignment.tools.convert.settings import Settings

LAYER = """the check looked at the first layer's q_proj only and failed for models or adapters without one; here the \
logits before and after are compared"""
WITH_ADAPTER = "the tokenizer beside the adapter is taken, else that of the base"
AS_BASE = "merged in float32, and stored as the base's files are; set --dtype otherwise"


def convert(top: Settings) -> list[Document]:
    """The command that merges, as a script."""
    top.require("model_settings")
    model, tokenizer = top.part("model_settings"), top.part("tokenizer_settings")
    tokenizer.leave_out(WITH_ADAPTER, "tokenizer_path")
    model.leave_out("the adapter's own tokenizer tells the new tokens", "embeddings_initialization_strategy")
    model.part("transformers_settings").leave_out(AS_BASE, "torch_dtype", "load_in_8bit", "trust_remote_code")
    model.leave_out("kernels change nothing in a merge", "liger_kernels_settings")
    model.leave_out("of no use in a merge", "model_kwargs.attn_implementation")
    command = ["merge", top.need("adapter_path"), "--base", backbone(model, tokenizer)["path"]]
    command += ["--out", top.need("save_path"), "--max-shard-size", top.take("max_shard_size", "400MB")]
    top.warn(LAYER, "merge_adapters_to_base")
    return [script("merging an adapter into its base", *command)]
