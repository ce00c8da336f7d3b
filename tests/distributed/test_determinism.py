"""Two runs of one seed are one run; on two ranks each draws its own dropout."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig

from lit_alignment import FSDP2Strategy, SFTModule
from lit_alignment.checkpoints.sharded import full
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import Seen, chats, sft_data, trainer
from tests.helpers.ranks import run_on_ranks

STRATEGIES = {"one": 1, "ddp": 2, "fsdp2": 2}


def train(folder, kind, seed=0):
    seed_everything(seed, verbose=False)
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")
    backbone = BackboneConfig("configs/tiny", weights="random")
    module = SFTModule(backbone, peft, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0))
    backends = {"process_group_backend": "gloo"}
    strategy = {"one": "auto", "ddp": DDPStrategy(**backends), "fsdp2": FSDP2Strategy(**backends)}[kind]
    seen = Seen()
    options = {"strategy": strategy, "devices": STRATEGIES[kind], "accumulate_grad_batches": 2, "max_epochs": 2}
    runner = trainer(folder, callbacks=[seen], **options)
    runner.fit(module, sft_data(module, chats(14), packing=False, batch_size=2, num_workers=1))
    weights = {name: full(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    torch.save((weights, seen.losses), folder / f"{runner.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_runs_of_one_seed_are_equal_to_the_bit(tmp_path, kind):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_on_ranks(train, folder, kind, seed, ranks=STRATEGIES[kind])
        found.append([torch.load(path) for path in sorted(folder.glob("*.pt"))])
    first, second, other = found
    for (weights, losses), (again, losses_again) in zip(first, second, strict=True):
        assert losses == losses_again
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert first[0][1] != other[0][1]
