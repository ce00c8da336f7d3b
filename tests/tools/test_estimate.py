"""What the estimate says of a configuration."""

from dataclasses import replace

import pytest
from jsonargparse import Namespace

from lit_alignment.errors import ConfigError
from lit_alignment.planning.memory import StepMemory
from lit_alignment.planning.run import GIB, Sharding, per_device, sharding_of
from lit_alignment.tools.estimate import main

TINY = "configs/sft/tiny.yaml"
MEMORY = StepMemory(
    parameters=100, trainable=50, weights=800, gradients=400, optimizer=1600, activations=300, loss=40, temporary=0,
    largest_layer=60, outside_layers=80,
)  # fmt: skip


def asked(strategy, devices=4, num_nodes=1):
    return Namespace(strategy=strategy, devices=devices, num_nodes=num_nodes)


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("auto", 800, 400, 1600),
        ("deepspeed_stage_1", 800, 400, 400),
        ("deepspeed_stage_2", 800, 100, 400),
        ("deepspeed_stage_3_offload", 200, 100, 400),
        ("fsdp", 200, 100, 400),
        (
            Namespace(class_path="lit_alignment.FSDP2Strategy", init_args=Namespace()),
            200, 100, 400,
        ),
        (
            Namespace(class_path="lightning.pytorch.strategies.DeepSpeedStrategy", init_args=Namespace(stage=3)),
            200, 100, 400,
        ),
    ],
)  # fmt: skip
def test_strategies_split_what_they_split(strategy, weights, gradients, optimizer):
    parts = per_device(MEMORY, sharding_of(asked(strategy)))
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (weights, gradients, optimizer)
    assert parts["activations"] == 300 and parts["logits and loss"] == 40


def test_sharded_weights_are_gathered_a_layer_at_a_time():
    parts = per_device(MEMORY, Sharding("fsdp", 4, weights=True, gradients=True, optimizer=True))
    assert parts["gathered weights"] == 2 * 60 + 80


def test_ddp_copies_gradients_into_buckets_and_one_device_does_not():
    assert per_device(MEMORY, sharding_of(asked("ddp")))["buckets of gradients"] == 400
    assert "buckets of gradients" not in per_device(MEMORY, sharding_of(asked("ddp", devices=1)))


def test_nodes_multiply_devices():
    assert sharding_of(asked("fsdp", devices=8, num_nodes=2)).devices == 16


def test_frozen_copy_is_split_as_weights_are_and_kept_gathered_outside_of_its_layers():
    memory = MEMORY.beside("model", adapters=False)
    assert per_device(memory, sharding_of(asked("deepspeed_stage_2")))["frozen copy"] == 800
    parts = per_device(memory, Sharding("fsdp", 4, weights=True, gradients=True, optimizer=True))
    assert parts["frozen copy"] == 200 and parts["gathered weights"] == 2 * 60 + 80 + 80
    assert memory.total == MEMORY.total + 800
    assert MEMORY.beside("model", adapters=True).copied == 400 and MEMORY.beside("adapter", True).copied == 400
    assert "frozen copy" not in per_device(MEMORY.beside("nothing", True), sharding_of(asked("auto")))


def test_reference_of_preferences_is_counted(capsys):
    for config, counted in (("tiny", False), ("tiny_kto", True)):
        main(["--config", f"configs/preference/{config}.yaml"])
        assert ("frozen copy" in capsys.readouterr().out) == counted


@pytest.mark.slow
def test_micro_batch_of_a_policy_has_the_prompts_with_all_their_responses(capsys):
    policy = ["--config", "configs/policy/tiny.yaml"]  # 4 prompts of up to 256 tokens, 8 responses of up to 8
    # Of the tiny model 2 layers with 2 heads of 16 numbers, in float32.
    size = 32 * 264 * 2 * 2 * 2 * 16 * 4 / GIB
    together = f"32 responses are generated together, of up to 264 tokens with their prompts: {size:.3f} GiB"
    main(policy)
    out = capsys.readouterr().out
    assert f"one packed row of {4 * (256 + 8 * 8)} tokens" in out and together in out
    main([*policy, "--data.init_args.packing=false"])
    out = capsys.readouterr().out
    assert f"{4 * 8} rows of {256 + 8} tokens" in out and together in out
    vllm = "--model.init_args.engine=lit_alignment.vllm.sampler.VLLMSampler"
    main([*policy, "--data.init_args.share_prompts=false", vllm])
    out = capsys.readouterr().out
    assert f"one packed row of {4 * 8 * (256 + 8)} tokens" in out and "generated together" not in out
    assert "vLLM's copy of the base, with its keys and values, come on top" in out


def test_keys_and_values_count_where_they_exceed_what_a_step_adds():
    fewer = per_device(replace(MEMORY, keys_values=340), sharding_of(asked("auto")))
    assert "keys and values beyond these" not in fewer
    found = per_device(replace(MEMORY, keys_values=400), sharding_of(asked("auto")))
    assert found["keys and values beyond these"] == 400 - 300 - 40
    assert replace(MEMORY, keys_values=400).total == MEMORY.total + 60


@pytest.mark.slow
def test_estimate_names_parts_and_says_whether_it_fits(capsys):
    main(["--config", TINY, "--memory", "1"])
    out = capsys.readouterr().out
    assert "parameters: " in out and "one packed row of 1024 tokens" in out and "fits into 1 GiB" in out
    assert all(part in out for part in ("weights", "gradients", "optimizer", "activations", "logits and loss", "total"))
    main(["--config", TINY, "--memory", "0.001"])
    out = capsys.readouterr().out
    assert "does not fit into 0.001 GiB" in out and "model.backbone.gradient_checkpointing: full (saves" in out


def test_gpu_configuration_is_estimated_without_a_gpu(capsys):
    arguments = ["--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.precision=bf16-mixed"]
    main(["--config", TINY, *arguments, "--trainer.strategy=fsdp", "--memory", "80"])
    out = capsys.readouterr().out
    assert "fsdp over 8 device(s)" in out and "with 1 GiB for the CUDA context" in out and "fits into 80 GiB" in out
    assert GIB == 1024**3


@pytest.mark.slow
def test_scale_adds_devices_on_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["--config", TINY, "--scale", "1,8", "--network", "1"])
    one, eight = (line.split() for line in capsys.readouterr().out.strip().splitlines()[-2:])
    assert (one[0], eight[0]) == ("1", "8") and one[2] == one[3] == "0.00"
    assert int(eight[-1].replace(",", "")) > 4 * int(one[-1].replace(",", ""))
    with pytest.raises(ConfigError, match=r"--scale 1,x: give numbers of devices"):
        main(["--config", TINY, "--scale", "1,x"])


@pytest.mark.parametrize("kind", ["sequence", "tensor"])
@pytest.mark.slow
def test_devices_that_share_a_micro_batch_do_its_work_together(kind, capsys):
    shared = ["--trainer.strategy", "lit_alignment.FSDP2Strategy", f"--trainer.strategy.{kind}_parallel_size", "2"]
    rows = []
    for more in ([], shared):
        main(["--config", TINY, "--scale", "8", *more])
        rows.append(capsys.readouterr().out.strip().splitlines()[-1].split())
    (alone, together) = ([float(cell.replace(",", "")) for cell in row] for row in rows)
    assert together[-1] < alone[-1]  # the same operations on as many devices, and something to exchange
    with pytest.raises(ConfigError, match="2 devices share a micro-batch; give multiples"):
        main(["--config", TINY, "--scale", "3", *shared])
