"""Tiny models for the tokenizer tests: 32 px, 4x4 patches, widths of 16 to 32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from smalti.schema import EncoderTrain, PixelStage, SemanticStage, TokenizerSection, VitSize

if TYPE_CHECKING:  # transformers: four seconds for a file of tests that needs none of it
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import SemHiTok

TINY = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread and a fixed global seed for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random SigLIP saved as an ordinary directory: 32 px, patch 8, width 24, two blocks."""
    from smalti.tokenizers.siglip import build_siglip

    torch.manual_seed(7)
    config = EncoderTrain(
        patch_size=8, hidden_size=24, layers=2, heads=2, text_layers=1, text_length=6
    )
    path = tmp_path_factory.mktemp("siglip")
    build_siglip(config, 32, vocab_size=40, pad_token_id=0, eos_token_id=1).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def encoder(siglip_dir: str) -> VisionEncoder:
    """The vision tower of `siglip_dir`."""
    from smalti.tokenizers.encoders import VisionEncoder

    return VisionEncoder.from_pretrained(siglip_dir)


@pytest.fixture
def pixels() -> Tensor:
    """Three smooth random images (3, 3, 32, 32) in [-1, 1]."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return torch.nn.functional.interpolate(
        coarse, size=(32, 32), mode="bilinear", align_corners=True
    )


def tiny_section(guidance: bool = True, **pixel: object) -> TokenizerSection:
    """A tokenizer section of tiny sizes; keyword arguments set keys of the pixel stage."""
    settings: dict[str, object] = {"codes": 3, "dim": 4, "encoder": TINY, "decoder": TINY} | pixel
    semantic = SemanticStage(dim=6, decoder_dim=16, decoder_heads=2, decoder_layers=1)
    return TokenizerSection(guidance=guidance, semantic=semantic, pixel=PixelStage(**settings))


@pytest.fixture
def make_tokenizer(encoder: VisionEncoder) -> Callable[..., SemHiTok]:
    """A function (guidance=True, **pixel keys) → SemHiTok with 10 semantic codes x 3 (or 30 flat
    ones), random weights.
    """
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok

    def make(guidance: bool = True, **pixel: object) -> SemHiTok:
        section = tiny_section(guidance, **pixel)
        if not guidance:
            return SemHiTok(
                section, PixelTokenizer(section.pixel, None, 32, encoder.grid, num_codes=30)
            )
        semantic = SemanticTokenizer(encoder.dim, section.semantic, 10, encoder.grid)
        with torch.no_grad():
            features = encoder(torch.rand(8, 3, 32, 32) * 2 - 1).flatten(0, 1)
        semantic.init_from(features[torch.randperm(len(features))[:10]])
        part = PixelTokenizer(section.pixel, semantic.codes, 32, encoder.grid)
        return SemHiTok(section, part, semantic, encoder)

    return make


@pytest.fixture
def section() -> Callable[..., TokenizerSection]:
    """`tiny_section` as a fixture."""
    return tiny_section


@pytest.fixture(scope="session")
def lpips_weights() -> Path:
    """Published LPIPS-VGG16 weights, where the set-up put them; tests that need them skip without."""
    path = Path(__file__).parents[2] / ".data" / "lpips-vgg16.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in .data (make setup fetches it)")
    return path
