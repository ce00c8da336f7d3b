"""The data module of the toy method: records of another form, everything else as in supervised fine-tuning."""

from lit_alignment import SFTDataModule
from lit_alignment.data.encoding.messages import Record, read_record
from lit_alignment.errors import RecordError


class FocalDataModule(SFTDataModule):
    """Records `{question, answer}`."""

    def read(self, raw: object, where: str, position: int) -> Record:
        """A question and its answer as a conversation."""
        if not isinstance(raw, dict) or not {"question", "answer"} <= raw.keys():
            raise RecordError(where, "question", "or 'answer' is missing", "Give both.")
        turns = [{"role": "user", "content": raw["question"]}, {"role": "assistant", "content": raw["answer"]}]
        rest = {name: value for name, value in raw.items() if name not in ("question", "answer")}
        return read_record({**rest, "messages": turns}, where, position)
