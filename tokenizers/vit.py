"""Vision transformers: pre-norm blocks, a pixel encoder, a pixel decoder.

Axis letters: B batch, N tokens (row-major over the grid), D width, H W pixels, P patch side.
Positions are fixed 2-D sine-cosine codes, computed for the grid in use: no weight depends on the
image size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.schema import VitSize


class Attention(nn.Module):
    """Multi-head self-attention, optionally causal."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Attend: (B, N, D) → (B, N, D)."""
        batch, tokens, dim = x_BND.shape
        qkv = (
            self.qkv(x_BND)
            .view(batch, tokens, 3, self.heads, dim // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class Transformer(nn.Module):
    """Blocks and a final norm.

    Weights are initialized as in ViT: truncated normal 0.02, residual outputs scaled by depth.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, mlp_ratio: int = 4, causal: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_linear)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                nn.init.trunc_normal_(parameter, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D), after the final norm."""
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND)


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer: truncated normal (0.02) weights, zero biases; ignore other
    modules.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_xavier(module: nn.Module | None) -> None:
    """Initialize a linear layer: Xavier-uniform weights, zero biases; ignore other modules."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """2-D sine-cosine position codes (ViT, MAE): float32 (rows·columns, dim).

    The first half codes the row, the second the column. The last channels of a width that is not a
    multiple of 4 are 0.
    """
    quarter = dim // 4
    if quarter == 0:
        raise ValueError(f"position codes need a width of at least 4, found {dim}")
    rates = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    parts = []
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij"
    )
    for axis in (rows, columns):
        angles = axis.reshape(-1, 1) * rates
        parts += [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, -1), (0, dim - 4 * quarter)).to(torch.float32)


def patchify(pixels_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut images into a grid of patches: (B, C, H, W) → (B, rows·columns, C·P·P), row-major."""
    batch, channels, height, width = pixels_BCHW.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise ValueError(
            f"an image of {height}x{width} cannot be divided into a grid of {rows}x{columns}"
        )
    x = pixels_BCHW.view(batch, channels, rows, height // rows, columns, width // columns)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches_BND: Tensor, grid: tuple[int, int], channels: int = 3) -> Tensor:
    """The inverse of `patchify` for square patches: (B, rows·columns, C·P·P) → (B, C, H, W)."""
    batch, _, size = patches_BND.shape
    side = math.isqrt(size // channels)
    x = patches_BND.view(batch, *grid, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, channels, grid[0] * side, grid[1] * side)


def working_patch(image_size: int, grid: tuple[int, int]) -> int:
    """Patch side with which a grid best covers an image of this size (384 px, 27 columns: 14)."""
    if max(grid) > image_size:
        raise ValueError(
            f"a grid of {grid[0]}x{grid[1]} is finer than an image of {image_size} pixels"
        )
    return max(1, round(image_size / max(grid)))


def resize(pixels_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images, bilinear with antialiasing; the same tensor if they have this size."""
    if tuple(pixels_BCHW.shape[-2:]) == size:
        return pixels_BCHW
    return F.interpolate(
        pixels_BCHW, size=size, mode="bilinear", align_corners=False, antialias=True
    )


class VitEncoder(nn.Module):
    """Pixel encoder: one vector per grid cell.

    An image that the grid does not divide is resized slightly first.
    """

    def __init__(self, image_size: int, grid: tuple[int, int], size: VitSize, out_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.patch = working_patch(image_size, grid)
        self.embed = nn.Linear(3 * self.patch**2, size.dim)
        self.body = Transformer(size.dim, size.layers, size.heads, size.mlp_ratio)
        self.head = nn.Linear(size.dim, out_dim)
        self.skip = nn.Linear(3 * self.patch**2, out_dim, bias=False) if size.skip else None
        for linear in (self.embed, self.head, self.skip):
            init_xavier(linear)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, N, out_dim)."""
        pixels_BCHW = resize(pixels_BCHW, (self.grid[0] * self.patch, self.grid[1] * self.patch))
        patches_BND = patchify(pixels_BCHW, self.grid)
        x_BND = self.embed(patches_BND)
        x_BND = x_BND + sincos_positions(self.grid, x_BND.shape[-1], x_BND.device).to(x_BND.dtype)
        out_BND = self.head(self.body(x_BND))
        return out_BND if self.skip is None else out_BND + self.skip(patches_BND)


class PixelDecoder(nn.Module):
    """Pixel decoder: code vectors to images.

    Args:
        in_dims: widths of the parts of a token. With two parts (concat `length`) the sequence is
            the N tokens of the
            first part, then the N of the second, and pixels are read from the second.
    """

    def __init__(
        self, image_size: int, grid: tuple[int, int], size: VitSize, in_dims: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = grid
        self.patch = working_patch(image_size, grid)
        self.embeds = nn.ModuleList(nn.Linear(dim, size.dim) for dim in in_dims)
        self.kinds = (
            nn.Parameter(torch.randn(len(in_dims), size.dim) * 0.02) if len(in_dims) > 1 else None
        )
        self.body = Transformer(size.dim, size.layers, size.heads, size.mlp_ratio)
        self.head = nn.Linear(size.dim, 3 * self.patch**2)
        self.skip = nn.Linear(sum(in_dims), 3 * self.patch**2, bias=False) if size.skip else None
        for linear in (*self.embeds, self.skip):
            init_xavier(linear)
        init_linear(self.head)

    @property
    def last_layer(self) -> Tensor:
        """The weight on which the adaptive GAN weight is measured."""
        return self.head.weight

    def forward(self, *parts_BND: Tensor) -> Tensor:
        """Images (B, 3, image_size, image_size), not clamped, of one (B, N, in_dim) tensor per
        part.
        """
        if len(parts_BND) != len(self.embeds):
            raise ValueError(f"found {len(parts_BND)} parts, expected {len(self.embeds)}")
        tokens = []
        for index, (embed, part) in enumerate(zip(self.embeds, parts_BND, strict=True)):
            x = embed(part)
            x = x + sincos_positions(self.grid, x.shape[-1], x.device).to(x.dtype)
            tokens.append(x if self.kinds is None else x + self.kinds[index].to(x.dtype))
        num_tokens = self.grid[0] * self.grid[1]
        x_BND = self.body(torch.cat(tokens, 1))[:, -num_tokens:]
        patches_BND = self.head(x_BND)
        if self.skip is not None:
            patches_BND = patches_BND + self.skip(torch.cat(parts_BND, -1))
        pixels = unpatchify(patches_BND, self.grid)
        return resize(pixels, (self.image_size, self.image_size))
