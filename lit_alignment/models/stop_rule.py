"""What ends a turn: the tokens and strings that were trained as its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_alignment.errors import CheckpointError
from lit_alignment.files import GenerationDescription, config_in


@dataclass(frozen=True)
class StopRule:
    """What ends a turn besides the user's stop strings.

    Args:
        token_ids: Tokens that end it.
        strings: Texts that end it, where the template closes a turn with plain text.
    """

    token_ids: list[int]
    strings: list[str]


def stop_rule(
    tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[int], end_of_call: Sequence[int] = ()
) -> StopRule:
    """The stop rule that belongs to what was trained as the end of a turn.

    Args:
        tokenizer: Knows EOS and which tokens are special.
        end_of_turn: Ids that close a response in training.
        end_of_call: Ids that close one with a tool call.
    """
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    closing = [i for i in end_of_turn if i in special]
    if closing:
        ids += [closing[-1]] if closing[-1] not in ids else []  # some close the response, and then the turn
        plain = list(end_of_turn[: list(end_of_turn).index(closing[0])])
    else:
        plain = list(end_of_turn)
    after_call = [i for i in end_of_call if i in special]
    ids += [after_call[-1]] if after_call and after_call[-1] not in ids else []
    text = tokenizer.decode(plain).strip() if plain else ""
    return StopRule(ids, [text] if text else [])


def generation_config(tokenizer: PreTrainedTokenizerBase, stop: StopRule) -> GenerationConfig:
    """Generation settings under which a loaded model stops where it was trained to."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop.token_ids or None,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=stop.strings or None,
    )


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation settings of a model's or adapter's folder, if it has some.

    Raises:
        ConfigError: If they are no JSON object.
        CheckpointError: If they are none of transformers'.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    config_in(file, GenerationDescription, "a generation configuration")
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers refuses a field by whatever its use raises
        raise CheckpointError(f"{file}: not a generation configuration ({error}). Restore it, or remove it.") from error
