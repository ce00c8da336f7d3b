"""Projectors: shapes, what each computes, gradients, first weights, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.multimodal.projectors import (
    DeformableLayer,
    PerceiverResampler,
    PixelShuffle,
    ProjectorConfig,
    build_projector,
)

P, WIDTH_IN, WIDTH_OUT = 36, 12, 20
CASES = [
    ("linear", None, 36),
    ("mlp", None, 36),
    ("pixel_shuffle", 9, 9),
    ("pixel_shuffle", 4, 4),
    ("c_abstractor", 16, 16),  # not a divisor of the grid of patches
    ("c_abstractor", 64, 64),  # more than there are patches
    ("d_abstractor", 16, 16),
    ("d_abstractor", 49, 49),
    ("perceiver", 5, 5),
    ("perceiver", None, 64),
]


def projector(kind, number=None, **settings):
    torch.manual_seed(0)
    config = ProjectorConfig(kind, number, hidden_size=16, num_heads=4, **settings)
    return build_projector(config, P, WIDTH_IN, WIDTH_OUT)


@pytest.mark.parametrize("kind, asked, number", CASES)
def test_shape_gradients_and_independence_of_images(kind, asked, number):
    made = projector(kind, asked)
    features = torch.randn(3, P, WIDTH_IN, requires_grad=True)
    found = made(features)
    assert found.shape == (3, number, WIDTH_OUT) and number == ProjectorConfig(kind, asked).tokens_of(P)
    torch.testing.assert_close(made(features[1:2]), found[1:2], rtol=1e-4, atol=1e-5)
    found[0].square().sum().backward()
    assert (features.grad[0] != 0).any() and (features.grad[1:] == 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


def test_pixel_shuffle_gathers_each_square_of_neighbours():
    shuffle = PixelShuffle(16, 4, 1, 8, 2)
    shuffle.norm = shuffle.mlp = torch.nn.Identity()
    found = shuffle(torch.arange(16.0).view(1, 16, 1))
    assert found[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_deformable_layer_samples_where_it_says():
    """Without offsets every head reads the image at the query's own place, bilinearly."""
    layer = DeformableLayer(8, 2).eval()
    for part in (layer.offsets.bias, layer.mlp[2].weight, layer.mlp[2].bias, layer.leave.bias, layer.values.bias):
        torch.nn.init.zeros_(part)
    torch.nn.init.eye_(layer.leave.weight)
    layer.values.weight.data = torch.eye(8)[..., None, None]
    image, queries = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 8)
    centres = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]).view(1, 4, 1, 1, 2)
    found = layer(queries, image, centres) - queries
    expected = functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)  # midway between four patches
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_resampler_does_not_depend_on_the_order_of_patches():
    resampler = PerceiverResampler(3, WIDTH_IN, 16, WIDTH_OUT, 2, 4)
    features = torch.randn(1, P, WIDTH_IN)
    torch.testing.assert_close(resampler(features), resampler(features.flip(1)), rtol=1e-4, atol=1e-5)


def test_abstractors_depend_on_the_order_of_patches():
    features = torch.randn(1, P, WIDTH_IN)
    for kind in ("c_abstractor", "d_abstractor"):
        made = projector(kind, 16)
        assert not torch.allclose(made(features), made(features.flip(1)), atol=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp_is_linear_layers_with_gelu_between(depth):
    made = projector("mlp", depth=depth)
    features = torch.randn(2, P, WIDTH_IN)
    expected = features
    for number, name in enumerate(sorted({key.partition(".")[0] for key in made.state_dict()})):
        layer = made[int(name)]
        expected = functional.linear(functional.gelu(expected) if number else expected, layer.weight, layer.bias)
    torch.testing.assert_close(made(features), expected)
    assert number + 1 == depth


def test_first_weights_come_from_a_file(tmp_path):
    made = projector("perceiver", 5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    again = projector("perceiver", 5, weights=str(tmp_path / "w.safetensors"))
    for name, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)
    with pytest.raises(ConfigError, match="not weights of this projector"):
        projector("mlp", weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        projector("mlp", weights=str(tmp_path / "broken.safetensors"))
    with pytest.raises(FileNotFoundError, match="Check projector.weights"):
        projector("mlp", weights=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "kind, number, patches, message",
    [
        ("mlp", 9, 36, "makes one embedding of each of the encoder's 36 patches"),
        ("c_abstractor", 8, 36, "num_tokens is 8, and c_abstractor needs a square"),
        ("d_abstractor", 9, 37, "number of patches is 37, and d_abstractor needs a square"),
        ("pixel_shuffle", 25, 36, "a grid of 6 x 6 patches cannot be split into 5 x 5"),
        ("perceiver", 0, 36, "num_tokens is 0; use 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kind, number, patches, message):
    with pytest.raises(ConfigError, match=message):
        ProjectorConfig(kind, number).tokens_of(patches)
