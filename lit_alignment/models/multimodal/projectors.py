"""Projectors: from an encoder's patch features to embeddings of the language model.

B images, P patches, D_in width of the features, Q embeddings of an image, D_out width of the language model
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lit_alignment.errors import CheckpointError, ConfigError

ProjectorKind = Literal["linear", "mlp", "c_abstractor", "d_abstractor", "perceiver", "pixel_shuffle"]
KEEPS_PATCHES = ("linear", "mlp")  # one embedding a patch
NEEDS_SQUARE = ("c_abstractor", "d_abstractor", "pixel_shuffle")


@dataclass(frozen=True)
class ProjectorConfig:
    """How features become embeddings.

    Args:
        kind: `linear` and `mlp` make one embedding of each patch; `pixel_shuffle` one of each square of patches;
            `c_abstractor` and `d_abstractor` any square number, `perceiver` any number of the whole image.
        num_tokens: Q, embeddings of an image; by default P, and 64 for `perceiver`.
        depth: Linear layers of `mlp` and `pixel_shuffle`, blocks on each side of `c_abstractor`, layers of
            `d_abstractor` and `perceiver`; by default 2, 2, 3, 3 and 3.
        hidden_size: Width inside `c_abstractor`, `d_abstractor` and `perceiver`.
        num_heads: Heads of attention of `d_abstractor` and `perceiver`.
        weights: A safetensors file with the first weights, named as in this projector.
    """

    kind: ProjectorKind = "mlp"
    num_tokens: int | None = None
    depth: int | None = None
    hidden_size: int = 1024
    num_heads: int = 8
    weights: str | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing."""
        for name in ("num_tokens", "depth", "hidden_size", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"projector.{name} is {value}; use 1 or more.")
        if self.kind in ("d_abstractor", "perceiver") and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"projector.hidden_size is {self.hidden_size}, which {self.num_heads} heads cannot share. "
                "Make it a multiple of projector.num_heads."
            )

    def tokens_of(self, num_patches: int) -> int:
        """Q for an encoder with P patches.

        Raises:
            ConfigError: If this projector cannot make so many of them.
        """
        number = self.num_tokens or (64 if self.kind == "perceiver" else num_patches)
        if self.kind in KEEPS_PATCHES and number != num_patches:
            raise ConfigError(
                f"projector.num_tokens is {number}, but {self.kind} makes one embedding of each of the encoder's "
                f"{num_patches} patches. Set it to {num_patches} or leave it out, or choose another kind."
            )
        if self.kind in NEEDS_SQUARE:
            for name, value in (("num_tokens", number), ("the encoder's number of patches", num_patches)):
                if math.isqrt(value) ** 2 != value:
                    raise ConfigError(
                        f"projector: {name} is {value}, and {self.kind} needs a square. Use perceiver, or set the "
                        "encoder's keep_cls to false."
                    )
        if self.kind == "pixel_shuffle" and math.isqrt(num_patches) % math.isqrt(number):
            raise ConfigError(
                f"projector.num_tokens is {number}: a grid of {math.isqrt(num_patches)} x {math.isqrt(num_patches)} "
                f"patches cannot be split into {math.isqrt(number)} x {math.isqrt(number)} equal squares."
            )
        return number


def build_projector(config: ProjectorConfig, num_patches: int, width_in: int, width_out: int) -> nn.Module:
    """A projector, [B, P, D_in] -> [B, Q, D_out], in fp32.

    Args:
        config: Which one.
        num_patches: P.
        width_in: D_in.
        width_out: D_out.

    Raises:
        ConfigError: If it cannot have these sizes, or its first weights have others.
    """
    number = config.tokens_of(num_patches)
    inside, heads = config.hidden_size, config.num_heads
    projector: nn.Module
    match config.kind:
        case "linear":
            projector = nn.Linear(width_in, width_out)
        case "mlp":
            projector = MLP(width_in, width_out, config.depth or 2)
        case "pixel_shuffle":
            projector = PixelShuffle(num_patches, number, width_in, width_out, config.depth or 2)
        case "c_abstractor":
            projector = CAbstractor(num_patches, number, width_in, inside, width_out, config.depth or 3)
        case "d_abstractor":
            projector = DAbstractor(num_patches, number, width_in, inside, width_out, config.depth or 3, heads)
        case "perceiver":
            projector = PerceiverResampler(number, width_in, inside, width_out, config.depth or 3, heads)
    if config.weights is not None:
        _load(projector, Path(config.weights).expanduser())
    return projector


def _load(projector: nn.Module, path: Path) -> None:
    """Take first weights from a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()}). Check projector.weights.")
    try:
        projector.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}). Check projector.weights.") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ConfigError(f"{path}: not weights of this projector ({reason}). Check projector's settings.") from error


class MLP(nn.Sequential):
    """Linear layers with GELU between them, on each patch by itself.

    Q = P. Source: Liu et al. 2023, LLaVA-1.5 (arXiv:2310.03744).
    """

    def __init__(self, width_in: int, width_out: int, depth: int) -> None:
        """Widths are D_out from the first layer on."""
        layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(width_out, width_out)]
        super().__init__(*layers)


class PixelShuffle(nn.Module):
    """Each square of r x r neighbouring patches becomes one vector of r^2 D_in numbers, and that goes through an MLP.

    Q = P / r^2. Source: Shi et al. 2016 (arXiv:1609.05158), as in InternVL 1.5, Chen et al. 2024 (arXiv:2404.16821).
    """

    def __init__(self, num_patches: int, number: int, width_in: int, width_out: int, depth: int) -> None:
        """Sizes as of `build_projector`."""
        super().__init__()
        self.grid, self.side = math.isqrt(number), math.isqrt(num_patches // number)
        self.norm = nn.LayerNorm(width_in * self.side**2)
        self.mlp = MLP(width_in * self.side**2, width_out, depth)

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, D_in] -> [B, Q, D_out]."""
        batch, _, width = features.shape
        squares = features.view(batch, self.grid, self.side, self.grid, self.side, width).transpose(2, 3)
        found: Tensor = self.mlp(self.norm(squares.reshape(batch, self.grid**2, self.side**2 * width)))
        return found


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution with squeeze-and-excitation, around a shortcut.

    Source: Radosavovic et al. 2020 (arXiv:2003.13678), block Y with groups of one channel; Hu et al. 2018
    (arXiv:1709.01507) for the excitation.
    """

    def __init__(self, width_in: int, width: int) -> None:
        """The shortcut is a 1x1 convolution where the width changes."""
        super().__init__()
        squeezed = max(1, width_in // 4)
        self.enter = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), ChannelNorm(width), nn.SiLU())
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), ChannelNorm(width), nn.SiLU()
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )
        self.leave = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width))
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), ChannelNorm(width))

    def forward(self, image: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H, W]."""
        hidden = self.mix(self.enter(image))
        return functional.silu(self.leave(hidden * self.excite(hidden)) + self.shortcut(image))


class CAbstractor(nn.Module):
    """Convolutions over the grid of patches, average pooling to the grid of embeddings, convolutions over that.

    out = MLP(stage_2(pool(stage_1(features + positions)))); Q is any square, whatever P is.

    Source: Cha et al. 2024, Honeybee (arXiv:2312.06742), C-Abstractor.
    """

    def __init__(self, num_patches: int, number: int, width_in: int, width: int, width_out: int, depth: int) -> None:
        """Sizes as of `build_projector`; `width` is that of the convolutions."""
        super().__init__()
        self.grid = math.isqrt(num_patches)
        self.positions = nn.Parameter(torch.empty(1, num_patches, width_in))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = nn.Sequential(*(RegNetBlock(width if i else width_in, width) for i in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d(math.isqrt(number))
        self.after = nn.Sequential(*(RegNetBlock(width, width) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(width, width_out), nn.SiLU(), nn.Linear(width_out, width_out))

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, D_in] -> [B, Q, D_out]."""
        batch, _, width = features.shape
        image = (features + self.positions).transpose(1, 2).reshape(batch, width, self.grid, self.grid)
        pooled = self.after(self.pool(self.before(image)))
        found: Tensor = self.readout(pooled.flatten(2).transpose(1, 2))
        return found


class DAbstractor(nn.Module):
    """Each embedding looks at a few positions of the image around its own in the grid, which it chooses itself.

    The queries begin as the average-pooled features. Q is any square, whatever P is.

    Source: Cha et al. 2024, Honeybee (arXiv:2312.06742), D-Abstractor; deformable attention of Zhu et al. 2021
    (arXiv:2010.04159).
    """

    def __init__(
        self, num_patches: int, number: int, width_in: int, width: int, width_out: int, depth: int, heads: int
    ) -> None:
        """Sizes as of `build_projector`; `width` is that of the attention."""
        super().__init__()
        self.grid, self.side = math.isqrt(num_patches), math.isqrt(number)
        self.enter = nn.Linear(width_in, width)
        self.positions = nn.Parameter(torch.empty(1, num_patches, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.ModuleList(DeformableLayer(width, heads) for _ in range(depth))
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width_out))
        centres = (torch.arange(self.side) + 0.5) / self.side * 2 - 1  # as grid_sample counts: -1 to 1
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).view(1, -1, 1, 1, 2), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, D_in] -> [B, Q, D_out]."""
        patches = self.enter(features) + self.positions
        image = patches.transpose(1, 2).reshape(len(features), -1, self.grid, self.grid)
        queries = functional.adaptive_avg_pool2d(image, self.side).flatten(2).transpose(1, 2)
        for layer in self.layers:
            queries = layer(queries, image, self.centres)
        found: Tensor = self.readout(queries)
        return found


class DeformableLayer(nn.Module):
    """Deformable cross-attention of the queries to the image, and an MLP, each with its residual."""

    POINTS = 4  # positions that a head looks at

    def __init__(self, width: int, heads: int) -> None:
        """Offsets begin in a different direction for each head, and grow with the point."""
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.offsets = nn.Linear(width, heads * self.POINTS * 2)
        self.weights = nn.Linear(width, heads * self.POINTS)
        self.values, self.leave = nn.Conv2d(width, width, 1), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        angles = torch.arange(heads) * (2 * math.pi / heads)
        steps = 0.1 * torch.arange(1, self.POINTS + 1)[None, :, None]
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_((torch.stack([angles.cos(), angles.sin()], -1)[:, None] * steps).flatten())

    def forward(self, queries: Tensor, image: Tensor, centres: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, D].

        Args:
            queries: [B, Q, D].
            image: [B, D, H, W].
            centres: Position of each query, from -1 to 1, [1, Q, 1, 1, 2].
        """
        batch, number, width = queries.shape
        normed = self.norm(queries)
        positions = centres + self.offsets(normed).view(batch, number, self.heads, self.POINTS, 2)
        weights = self.weights(normed).view(batch, number, self.heads, self.POINTS).softmax(-1)
        values = self.values(image).reshape(batch * self.heads, width // self.heads, *image.shape[2:])
        positions = positions.permute(0, 2, 1, 3, 4).reshape(batch * self.heads, number, self.POINTS, 2)
        seen = functional.grid_sample(
            values, positions, align_corners=False, padding_mode="border"
        )  # [B*H, D/H, Q, points]
        weights = weights.permute(0, 2, 1, 3).reshape(batch * self.heads, 1, number, self.POINTS)
        mixed = (seen * weights).sum(-1).reshape(batch, width, number).transpose(1, 2)
        queries = queries + self.leave(mixed)
        found: Tensor = queries + self.mlp(self.norm_mlp(queries))
        return found


class PerceiverResampler(nn.Module):
    """Q learned queries, each layer of which looks at the features and at the queries themselves.

    Source: Alayrac et al. 2022, Flamingo (arXiv:2204.14198), Perceiver Resampler.
    """

    def __init__(self, number: int, width_in: int, width: int, width_out: int, depth: int, heads: int) -> None:
        """Sizes as of `build_projector`; `width` is that of the attention."""
        super().__init__()
        self.enter = nn.Linear(width_in, width)
        self.queries = nn.Parameter(torch.randn(1, number, width) * width**-0.5)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width_out))

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, D_in] -> [B, Q, D_out]."""
        features = self.enter(features)
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        found: Tensor = self.readout(queries)
        return found


class ResamplerLayer(nn.Module):
    """Attention of the queries to features and queries, and an MLP, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        """Norms come before each part."""
        super().__init__()
        self.norm_features, self.norm_queries, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, D]."""
        normed = self.norm_queries(queries)
        seen = torch.cat([self.norm_features(features), normed], 1)
        queries = queries + self.attention(normed, seen, seen, need_weights=False)[0]
        found: Tensor = queries + self.mlp(self.norm_mlp(queries))
        return found
