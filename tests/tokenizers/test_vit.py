"""Transformers: patches, positions, and grids that do not divide the image."""

from __future__ import annotations

import pytest
import torch

from smalti.schema import VitSize
from smalti.tokenizers.vit import (
    PixelDecoder,
    Transformer,
    VitEncoder,
    patchify,
    sincos_positions,
    unpatchify,
    working_patch,
)

TINY = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)


def test_patches_are_row_major_and_come_back() -> None:
    x = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    patches = patchify(x, (4, 4))
    assert torch.equal(patches[1, 5].view(3, 2, 2), x[1, :, 2:4, 2:4])
    assert torch.equal(unpatchify(patches, (4, 4)), x)


def test_an_image_that_does_not_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="3x3"):
        patchify(torch.zeros(1, 3, 8, 8), (3, 3))


def test_positions_are_distinct_and_follow_rows_and_columns() -> None:
    codes = sincos_positions((5, 7), 16)
    assert codes.shape == (35, 16)
    assert len(codes.unique(dim=0)) == 35
    grid = codes.view(5, 7, 16)
    assert torch.equal(grid[2, 0, :8], grid[2, 6, :8]), "the first half knows the row alone"
    assert torch.equal(grid[0, 3, 8:], grid[4, 3, 8:]), "the second half knows the column alone"
    assert sincos_positions((2, 2), 18).shape == (4, 18)
    with pytest.raises(ValueError, match="at least 4"):
        sincos_positions((2, 2), 3)


def test_the_transformer_without_positions_commutes_with_permutations() -> None:
    body = Transformer(16, 2, 2).eval()
    x, order = torch.randn(2, 9, 16), torch.randperm(9)
    torch.testing.assert_close(body(x)[:, order], body(x[:, order]), rtol=1e-4, atol=1e-5)


def test_attention_mixes_all_tokens_of_an_image_and_no_other_image() -> None:
    body = Transformer(16, 1, 2)
    x = torch.randn(2, 6, 16, requires_grad=True)
    body(x)[0, 0].sum().backward()
    assert bool((x.grad[0].abs().sum(-1) > 0).all())
    assert not x.grad[1].any()


@pytest.mark.parametrize(
    ("image_size", "side", "patch"), [(224, 16, 14), (256, 16, 16), (384, 27, 14), (64, 8, 8)]
)
def test_published_sizes(image_size: int, side: int, patch: int) -> None:
    assert working_patch(image_size, (side, side)) == patch
    encoder, decoder = (
        VitEncoder(image_size, (side, side), TINY, 4),
        PixelDecoder(image_size, (side, side), TINY, (4,)),
    )
    p = encoder(torch.zeros(1, 3, image_size, image_size))
    assert p.shape == (1, side * side, 4)
    assert decoder(p).shape == (1, 3, image_size, image_size)


def test_a_grid_finer_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="finer"):
        working_patch(8, (16, 16))


def test_a_decoder_of_two_parts_reads_the_second() -> None:
    decoder = PixelDecoder(16, (2, 2), TINY, (3, 5))
    first, second = torch.randn(1, 4, 3), torch.randn(1, 4, 5)
    assert decoder(first, second).shape == (1, 3, 16, 16)
    assert not torch.allclose(decoder(first, second), decoder(first + 1, second)), (
        "the first part is attended to"
    )
    with pytest.raises(ValueError, match="1 parts"):
        decoder(first)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        Transformer(16, 1, 3)


def test_a_linear_skip_alone_can_pass_patches_through() -> None:
    size = TINY.model_copy(update={"skip": True})
    encoder, decoder = VitEncoder(8, (2, 2), size, 48), PixelDecoder(8, (2, 2), size, (40, 8))
    with torch.no_grad():
        for module in (encoder.head, decoder.head):
            module.weight.zero_()
            module.bias.zero_()
        encoder.skip.weight.copy_(torch.eye(48))
        decoder.skip.weight.copy_(torch.eye(48))
    pixels = torch.rand(2, 3, 8, 8)
    first, second = encoder(pixels).split((40, 8), -1)
    torch.testing.assert_close(decoder(first, second), pixels)
