"""One rank of each strategy that shards: the losses of one process, and it resumes."""

import pytest
from lightning.pytorch import seed_everything

from lit_alignment import DeepSpeedStrategy, FSDP2Strategy, SFTModule
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers.devices import BOTH, GPU, LORA, fit

WAYS = {
    "shards": {},
    "offload": {"cpu_offload": True},
    "offload, one file": {"cpu_offload": True, "save_distributed_checkpoint": False},
    "saved in the background": {"async_save": True},
}


def run(folder, base, strategy, accelerator, resume=None, precision="32-true"):
    seed_everything(0, verbose=False)
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0)
    module = SFTModule(BackboneConfig(base, dtype="float32"), LORA, optimizer=optimizer)
    seen, _ = fit(folder, module, resume, accelerator=accelerator, strategy=strategy, precision=precision)
    return seen


@BOTH
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("_one_process_group")
def test_one_rank_of_fsdp2_trains_saves_and_resumes_as_one_process(way, accelerator, base, tmp_path):
    expected = run(tmp_path / "one", base, "auto", accelerator)
    whole = run(tmp_path, base, FSDP2Strategy(**WAYS[way]), accelerator)
    assert whole.ids == expected.ids and whole.losses == pytest.approx(expected.losses, rel=1e-4)
    again = run(tmp_path / "again", base, FSDP2Strategy(**WAYS[way]), accelerator, tmp_path / "saved/step=3.ckpt")
    assert again.ids == expected.ids[3:] and again.losses == pytest.approx(expected.losses[3:], rel=1e-4)


@GPU
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.usefixtures("_one_process_group")
def test_one_rank_of_deepspeed_trains_and_resumes_as_one_process(stage, base, tmp_path):
    pytest.importorskip("deepspeed")
    expected = run(tmp_path / "one", base, "auto", "gpu")
    whole = run(tmp_path, base, DeepSpeedStrategy(stage=stage), "gpu")
    assert whole.ids == expected.ids and whole.losses == pytest.approx(expected.losses, rel=1e-3)
    again = run(tmp_path / "again", base, DeepSpeedStrategy(stage=stage), "gpu", tmp_path / "saved/step=3.ckpt")
    assert again.ids == expected.ids[3:] and again.losses == pytest.approx(expected.losses[3:], rel=1e-3)
