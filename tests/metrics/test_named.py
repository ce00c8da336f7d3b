import torch

from lit_alignment.metrics.named import NamedMeans


def test_each_mean_is_over_its_own_values_or_weights():
    """4 with weight 0.5 and 1 with weight 1.5 have the mean 3.5 / 2; what had no value has no mean."""
    metric = NamedMeans(["loss", "chat_loss", "margin", "length"])
    metric.update({"loss": torch.tensor([1.0, 2.0]), "length": torch.tensor([3])})
    metric.update({"loss": torch.tensor([6.0]), "margin": torch.zeros(0)})
    for value, weight in ((4.0, 0.5), (1.0, 1.5)):
        metric.update({"chat_loss": torch.tensor([value])}, torch.tensor([weight]))
    assert metric.compute() == {"loss": 3.0, "chat_loss": 1.75, "length": 3.0}
