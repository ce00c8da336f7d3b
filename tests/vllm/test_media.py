"""Images through vLLM: as its own LLaVA, or as embeddings among those of the tokens."""

import pytest

from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.models.multimodal.modality import ModalityConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.vllm.engine import collapsed
from tests.helpers import VISION, seen, vlm_data, vlm_module
from tests.vllm.helpers import by_transformers, by_vllm, lines, same_answers, trained

GREEDY = {"greedy": DecodingConfig(max_new_tokens=10, logprobs=True)}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("projector", "said"),
    [(ProjectorConfig("mlp"), "LLaVA:"), (ProjectorConfig("c_abstractor", 4), "its prompts go to vLLM as embeddings")],
    ids=["llava", "embeddings"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_answers_about_images_are_those_of_transformers(tmp_path, base, projector, said, lora, capsys):
    def module():
        return vlm_module(lora, base, image=ModalityConfig([VISION], projector), generation=GREEDY, train_encoder=True)

    records, asked = seen(tmp_path / "pictures", 6), seen(tmp_path / "others", 6, seed=1)
    checkpoint = trained(tmp_path, first := module(), vlm_data(first, records, asked), steps=6)
    runs = []
    for run in (by_transformers, by_vllm):
        folder = run(tmp_path, each := module(), vlm_data(each, None, asked), checkpoint)
        runs.append(lines(folder, "greedy"))
    assert len({line["answers"][0]["logprob"] for line in runs[0]}) > 1
    same_answers(*runs)
    assert said in capsys.readouterr().out


def test_one_placeholder_for_each_image_is_left():
    assert collapsed([1, 9, 9, 9, 2, 9, 9, 9, 9, 9, 9, 3], token_id=9, number=3) == [1, 9, 2, 9, 9, 3]
