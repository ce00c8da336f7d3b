"""Log-probabilities of targets against full logits, and the loss of SFT over the same batch."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from lit_alignment.data.batching.collate import collate_responses
from lit_alignment.data.encoding.example import Example
from lit_alignment.losses import linear_logps_and_entropies
from lit_alignment.models.head import head_loss
from lit_alignment.models.logprobs import hidden_at_targets, target_logps
from tests.helpers import sft_module


def responses(seed: int = 0) -> list[list[Example]]:
    """Two records: two responses to one prompt, and one response by itself."""
    generator = torch.Generator().manual_seed(seed)

    def ids(number):
        return torch.randint(3, 700, (number,), generator=generator).tolist()

    def example(prompt, response):
        labels = [-100] * len(prompt) + response
        return Example(prompt + response, labels, [0.0] * len(prompt) + [0.5 + n % 3 for n in range(len(response))])

    prompt = ids(7)
    return [[example(prompt, ids(5)), example(prompt, ids(9))], [example(ids(3), ids(4))]]


def full_logits(network, example: Example) -> torch.Tensor:
    """Logits that predict an example's targets, alone in its row, from transformers' own forward."""
    logits = network(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
    return logits[[t - 1 for t, label in enumerate(example.labels) if label != -100]]


def network_of(kind: str, packing: bool = True):
    """A module's network whose head is one product, a layer with an adapter, or scaled and capped."""
    module = sft_module()
    if kind == "lora":
        module.peft_config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    network = module.load_model(packing=packing, shared_prompts=packing)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("rows", ["shared", "packed", "padded"])
@pytest.mark.parametrize("kind", ["product", "lora"])
def test_target_logps_and_their_gradients_are_those_of_full_logits(kind, rows):
    network = network_of(kind, rows != "padded")
    records = responses()
    batch = collate_responses(records, 0 if rows == "padded" else None, share=rows == "shared")
    logps, entropies = target_logps(network, batch, temperature=0.7, with_entropy=True)
    expected = [full_logits(network, example) / 0.7 for own in records for example in own]
    distribution = torch.cat(expected).log_softmax(-1)
    torch.testing.assert_close(logps, distribution.gather(1, batch.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(distribution.exp() * distribution).sum(-1), rtol=1e-5, atol=1e-5)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 2, len(logps))
    found = torch.autograd.grad((logps * weights).sum() + (entropies * weights.flip(0)).sum(), trained)
    slow = distribution.gather(1, batch.targets[:, None])[:, 0]
    slow_entropies = -(distribution.exp() * distribution).sum(-1)
    wanted = torch.autograd.grad((slow * weights).sum() + (slow_entropies * weights.flip(0)).sum(), trained)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sums_by_response_follow_the_lengths():
    network = network_of("product")
    records = responses()
    batch = collate_responses(records, share=True)
    with torch.no_grad():
        sums = [float(part.sum()) for part in torch.split(target_logps(network, batch), batch.lengths)]
        for found, example in zip(sums, [example for own in records for example in own], strict=True):
            alone = collate_responses([[example]])
            assert found == pytest.approx(float(target_logps(network, alone).sum()), rel=1e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_loss_of_sft_and_target_logps_agree(packing):
    """The fused cross-entropy and minus the weighted log-probabilities: loss and every gradient, in fp32."""
    network = network_of("product", packing)
    batch = collate_responses([[example] for own in responses() for example in own], None if packing else 0)
    hidden = hidden_at_targets(network, batch)
    fused, _ = head_loss(network, hidden, batch.targets, batch.weights)
    plain = -(target_logps(network, batch) * batch.weights).sum()
    total = batch.weights.sum()
    assert (fused / total).item() == pytest.approx((plain / total).item(), abs=1e-6)
    parameters = list(network.parameters())
    pairs = zip(
        torch.autograd.grad(fused / total, parameters), torch.autograd.grad(plain / total, parameters), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropies_and_their_gradients_equal_full_logits(scale, softcap, temperature):
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    targets = torch.randint(0, 17, (11,))
    settings = {"scale": scale, "softcap": softcap, "temperature": temperature}
    found = linear_logps_and_entropies(hidden, weight, targets, **settings, chunk_size=4)
    logits = scale * hidden @ weight.T
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    expected = distribution.log_prob(targets), distribution.entropy()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    factors = torch.randn(2, 11)
    gradients = [
        torch.autograd.grad((factors * torch.stack(each)).sum(), (hidden, weight)) for each in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("kind", ["product", "lora"])
def test_logits_of_all_targets_never_exist(kind):
    network = network_of(kind)
    ids = torch.randint(3, 700, (1100,)).tolist()
    batch = collate_responses([[Example(ids, ids, [1.0] * len(ids))]])
    vocabulary = network.get_input_embeddings().weight.shape[0]
    with Largest() as largest:
        logps, entropies = target_logps(network, batch, with_entropy=True)
        (logps.sum() + entropies.sum()).backward()
    assert largest.numel < 1099 * vocabulary / 2


@pytest.mark.parametrize("kind", ["product", "lora"])
def test_batch_without_targets_has_none_and_gives_every_weight_a_gradient(kind):
    """What a rank gets that has no record left."""
    network = network_of(kind)
    batch = collate_responses([[Example([5, 6, 7], [-100] * 3, [0.0] * 3)]])
    logps = target_logps(network, batch)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)
