"""On a GPU the CPU queues work ahead; a value that is read, or a shape made of values, makes it wait for the queue."""

from dataclasses import replace

import pytest
import torch

from lit_alignment import LossConfig, RAGModule, RetrieverDataModule, RetrieverModule, RolloutConfig, SourceConfig
from tests.helpers import (
    RETRIEVER,
    chats,
    class_data,
    classifier,
    distillation_data,
    distillation_module,
    encoded_index,
    judged,
    knowledge,
    labelled,
    pairs,
    policy_data,
    policy_module,
    preference_data,
    preference_module,
    rag_data,
    rag_module,
    reward_data,
    reward_model,
    seen,
    sft_data,
    sft_module,
    trainer,
    vlm_data,
    vlm_module,
)
from tests.helpers.waits import NothingFromTheHost, Waits

ROLLOUT = RolloutConfig(num_responses=2, max_new_tokens=4)
PADDED = {"packing": False, "batch_size": 2}


def of_sft(folder, **settings):
    module = sft_module(neftune_alpha=5.0)
    return module, sft_data(module, chats(6), **(settings or {"tokens_per_batch": 512}))


def of_classification(folder):
    module = classifier(class_weights="balanced", focal_gamma=2.0)
    return module, class_data(module, labelled(6), tokens_per_batch=512)


def of_reward(folder):
    module = reward_model(center=0.01)
    return module, reward_data(module, pairs(6), tokens_per_batch=512)


def of_pairs(folder):
    module = preference_module(lora=True, losses=[LossConfig("sigmoid"), LossConfig("sft")])
    return module, preference_data(module, pairs(6), tokens_per_batch=512)


def of_judged(folder):
    module = preference_module(lora=True, losses=[LossConfig("kto")])
    return module, preference_data(module, judged(8), kind="outcomes", **PADDED)


def of_policy(folder):
    module = policy_module(rollout=ROLLOUT)
    return module, policy_data(module, chats(6, longest=5), batch_size=2)


def of_distillation(folder):
    module = distillation_module(rollout=ROLLOUT)
    return module, distillation_data(module, chats(6, longest=5), batch_size=2)


def of_rag(folder):
    module = rag_module(encoded_index(folder, knowledge(6)), num_passages=3, objective="rag_sequence")
    return module, rag_data(module, chats(6, longest=5), batch_size=2)


def of_retriever(folder):
    module = RetrieverModule(replace(RETRIEVER, towers="separate"))
    questions = [{"query": each.text, "positive": {"text": each.title * 3}} for each in knowledge(6)]
    data = RetrieverDataModule(
        module.tokenizer, train=[SourceConfig(records=questions, name="questions")], batch_size=2, packing=False
    )
    return module, data


def of_vlm(folder):
    module = vlm_module(train_encoder=True)
    return module, vlm_data(module, seen(folder, 6), **PADDED)


METHODS = {
    "sft": of_sft,
    "sft-padded": lambda folder: of_sft(folder, **PADDED),
    "classification": of_classification,
    "reward": of_reward,
    "preference": of_pairs,
    "kto": of_judged,
    "policy": of_policy,
    "distillation": of_distillation,
    "rag": of_rag,
    "retriever": of_retriever,
    "vlm": of_vlm,
}


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    """A module after three steps, and what was seen in the last two."""
    folder = tmp_path_factory.mktemp("run")
    module, data = METHODS[request.param](folder)
    waits = Waits()
    trainer(folder, callbacks=[waits], max_steps=3, max_epochs=3, log_every_n_steps=50).fit(module, data)
    return module, waits


def test_a_step_waits_for_the_device_once_at_most(trained):
    """For the norm of the gradients, which has to be finite before the weights change."""
    _, waits = trained
    assert waits.micro_batches >= 2
    assert sum(waits.places.values()) <= waits.micro_batches, waits.places


def test_step_runs_where_nothing_can_be_read(trained):
    """On the meta device, where tensors have no values, and another device's tensors do not mix with them."""
    module, waits = trained
    if isinstance(module, RAGModule):  # what is retrieved decides the texts
        passages, scores = module.retrieve([item.query for item in waits.batch.items])
        scores = scores.detach().to("meta").requires_grad_()
        module.retrieve = lambda queries: (passages, scores)
    batch = module.trainer.strategy.batch_to_device(waits.batch, torch.device("meta"))
    module.to("meta").zero_grad()
    module.log = lambda *args, **settings: None  # the run is over
    with NothingFromTheHost():
        module.training_step(batch, 0).backward()
    assert any(parameter.grad is not None for parameter in module.parameters())
