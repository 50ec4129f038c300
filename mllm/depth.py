"""A unified model whose visual places hold several codes (DualToken, arXiv 2503.14324).

An image is T places. Each is one position of the sequence with the same token, `<IMG_0>`; the
place's codes are passed separately. The language model receives there the adapter's output of the
place's vector [ẑ_pix ; ẑ_sem]. Two heads, one per codebook, predict the codes of a place from the
hidden state before it, one depth after the other: p(k_d | hidden, k_1 … k_{d−1}).

Axes: B sequences, L positions, N places, P codebooks (2: pixel, semantic), R depth, K codes, W
width of a code, C = P·W, H width of the language model, M sample vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smalti.errors import VocabularyError
from smalti.mllm.adapters import Adapter
from smalti.mllm.decoder import Decoder
from smalti.mllm.depth_head import DepthHead
from smalti.mllm.generation import prompt_rows
from smalti.mllm.losses import IGNORE
from smalti.mllm.model import Batch, ModelSettings, UnifiedModel
from smalti.mllm.rows import WholeRows, root_mean_square
from smalti.mllm.sampling import choose, guidance, sample_uniform, seeds_of
from smalti.mllm.sequences import (
    Kind,
    Row,
    SequenceBuilder,
    SequenceSettings,
    TokenSequence,
    source_of,
)
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads
from smalti.tokenizers.dualtoken import BOOKS

if TYPE_CHECKING:
    from smalti.schema import ModelPart, Sampling

SAMPLE = 4096
"""Random places to fit the adapter to, if no sample of real ones is given."""


class DepthModel(UnifiedModel):
    """A unified model over places of several codes; see the module's docstring.

    Of the parts with learning rates of their own (`mllm.lr`, `mllm.freeze`), the heads belong to
    `new_rows`, because they predict the new tokens.

    Args:
        causal_lm: see `UnifiedModel`.
        adapter: maps vectors of places (…, C) to H.
        code_vectors_PKW: both codebooks.
        vocabulary: has one visual token, that of a place.
        size: sizes of the heads.
        depth: R.
        settings: see `UnifiedModel`.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        adapter: Adapter,
        code_vectors_PKW: Tensor,
        vocabulary: VisualVocabulary,
        *,
        size: DepthHeads,
        depth: int,
        **settings: Unpack[ModelSettings],
    ) -> None:
        super().__init__(causal_lm, adapter, code_vectors_PKW, vocabulary, **settings)
        self.size = size
        self.depth = depth
        _, num_codes, width = code_vectors_PKW.shape
        hidden = self.embedding.embedding_dim
        self.heads = nn.ModuleDict(
            {name: DepthHead(size, hidden, width, num_codes, depth) for name in BOOKS}
        )

    def check_vectors(self, code_vectors_VC: Tensor, vocabulary: VisualVocabulary) -> None:
        """Raise VocabularyError unless there are two codebooks and one visual token."""
        two_books = code_vectors_VC.ndim == 3 and len(code_vectors_VC) == len(BOOKS)
        if not two_books or vocabulary.num_codes != 1:
            raise VocabularyError(
                f"Code vectors {tuple(code_vectors_VC.shape)} with {vocabulary.num_codes} visual "
                "tokens; expected two codebooks (2, K, W) and one token for a place. Build the "
                "model with the tokenizer that created its tokens."
            )

    @property
    def num_codes(self) -> int:
        """K, the number of codes of each codebook."""
        return self.code_vectors_VC.shape[1]

    @torch.no_grad()
    def start_visual(
        self, head_gain: float = 1.0, chunk: int = 65_536, sample_MC: Tensor | None = None
    ) -> None:
        """Fit the adapter to vectors of places, its output at the scale of the text embedding.

        Args:
            head_gain: unused; the heads keep their random weights.
            chunk: unused.
            sample_MC: vectors of real places (default: of random codes).
        """
        if sample_MC is None:
            generator = torch.Generator().manual_seed(0)
            shape = (SAMPLE, len(BOOKS), self.depth)
            sample_MC = self.place_vectors(
                torch.randint(self.num_codes, shape, generator=generator)
            )
        self.adapter.fit(sample_MC)
        vectors_MH = self.adapter(sample_MC[:SAMPLE])
        scale = root_mean_square(WholeRows(vectors_MH), len(vectors_MH)).clamp_min(1e-12)
        embed_rows = self.matrices.rows(self.embedding.weight)
        text_scale = root_mean_square(embed_rows, self.vocabulary.num_text)
        self.adapter.scale_output(float(text_scale / scale))

    def visual_rows(self, start: int, stop: int) -> Tensor:
        """Zeros (n, H): a plain embedding row cannot depend on the codes of a place."""
        return self.embedding.weight.new_zeros(min(stop, 1) - start, self.adapter.out)

    def parts(self) -> dict[int, ModelPart]:
        return super().parts() | {id(p): "new_rows" for p in self.heads.parameters()}

    def sums(self, codes_NPR: Tensor) -> Tensor:
        """Partial sums ẑ_1 … ẑ_R of both codebooks: float32 (N, P, R, W)."""
        vectors = [
            F.embedding(codes_NPR[:, p], book_KW) for p, book_KW in enumerate(self.code_vectors_VC)
        ]
        return torch.stack(vectors, 1).cumsum(-2)

    def place_vectors(self, codes_NPR: Tensor) -> Tensor:
        """Vectors [ẑ_pix ; ẑ_sem] of places: float32 (N, C)."""
        return self.sums(codes_NPR)[:, :, -1].flatten(1)

    def inputs_embeds(self, ids_BL: Tensor, codes_NPR: Tensor | None = None) -> Tensor:
        """Embed token ids: (B, L) → (B, L, H).

        Args:
            ids_BL: ids of the flat vocabulary.
            codes_NPR: codes of their visual places in reading order; None without places.

        Raises:
            VocabularyError: if the number of places differs.
        """
        visual_BL = self.vocabulary.is_visual(ids_BL)
        if codes_NPR is None:
            codes_NPR = ids_BL.new_zeros(0, len(BOOKS), self.depth)
        if len(codes_NPR) != int(visual_BL.sum()):
            raise VocabularyError(
                f"The token ids have {int(visual_BL.sum())} visual places, but codes of "
                f"{len(codes_NPR)} places are given. Give (2, R) codes for each place."
            )
        return self._embedded(ids_BL, visual_BL, self.place_vectors(codes_NPR))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `UnifiedModel.forward`, on a batch with `codes` int64 (N, 2, R).

        At a predicted place the loss is the sum over both heads and all depths; elsewhere it is the
        text head's. `loss_image` is the mean of that sum over places; `loss_pixel` and
        `loss_semantic` are its two halves.

        The heads run even if no place is predicted (on one position, with no effect on the result),
        so that every rank of a parallel run does the same communication.
        """
        ids_BL = batch["input_ids"]
        codes_NPR = batch["codes"]
        hidden_BLH = self._hidden(self.inputs_embeds(ids_BL, codes_NPR), batch)
        hidden_SH = hidden_BLH[:, :-1].flatten(0, 1)
        labels_S = batch["labels"][:, 1:].reshape(-1)
        answers_S = batch["answer_mask"][:, 1:].reshape(-1) if "answer_mask" in batch else None
        places_S = self.vocabulary.is_visual(labels_S)
        weights_S = self._weights(batch, labels_S, answers_S)
        total, losses_S, correct_S = self.head(
            hidden_SH, labels_S.masked_fill(places_S, IGNORE), weights_S, self.loss_chunk
        )
        number_BL = self.vocabulary.is_visual(ids_BL).flatten().cumsum(0).view_as(ids_BL) - 1
        chosen_NPR = codes_NPR[number_BL[:, 1:].flatten()[places_S]]
        visual, losses_NPR = self._place_losses(
            hidden_SH[places_S], chosen_NPR, weights_S[places_S], hidden_SH[:1]
        )
        losses_S = losses_S.masked_scatter(places_S, losses_NPR.sum((1, 2)).to(losses_S.dtype))
        metrics = self._metrics(labels_S, losses_S, correct_S, answers_S)
        for name, losses_NR in zip(BOOKS, losses_NPR.unbind(1), strict=True):
            metrics[f"loss_{name}"] = losses_NR.sum() / metrics["tokens_image"].clamp_min(1)
        return (total + visual) / self._divisor(batch), metrics

    def _place_losses(
        self, hidden_NH: Tensor, codes_NPR: Tensor, weights_N: Tensor, any_1H: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ weights · losses of places, differentiable, and the losses float32 (N, P, R)."""
        count = len(codes_NPR)
        sums_NPRW = self.sums(codes_NPR)
        labels_NPR = codes_NPR
        if not count:
            hidden_NH = any_1H
            weights_N = weights_N.new_zeros(1)
            sums_NPRW = sums_NPRW.new_zeros(1, *sums_NPRW.shape[1:])
            labels_NPR = codes_NPR.new_full((1, *codes_NPR.shape[1:]), IGNORE)
        totals: list[Tensor] = []
        losses: list[Tensor] = []
        for p, head in enumerate(self.heads.values()):
            total, losses_NR = head(
                hidden_NH, sums_NPRW[:, p], labels_NPR[:, p], weights_N, self.loss_chunk
            )
            totals.append(total)
            losses.append(losses_NR)
        return torch.stack(totals).sum(), torch.stack(losses, 1)[:count].float()

    @torch.no_grad()
    def draw_place(self, hidden_RH: Tensor, sampling: Sampling, uniform_BPR: Tensor) -> Tensor:
        """Draw the codes of one place per image: int64 (B, 2, R).

        At every depth, guidance comes before temperature, top-k and top-p.

        Args:
            hidden_RH: hidden states, conditional rows first, then unconditional ones.
            sampling: guidance, temperature, top-k and top-p.
            uniform_BPR: random numbers in [0, 1).
        """
        codes = []
        for p, head in enumerate(self.heads.values()):
            vectors_KW = self.code_vectors_VC[p]
            sums_RdW = vectors_KW.new_zeros(len(hidden_RH), 0, vectors_KW.shape[1])
            own = []
            for d in range(self.depth):
                logits_BK = guidance(head(hidden_RH, sums_RdW).float(), sampling.cfg)
                own.append(choose(logits_BK, sampling, uniform_BPR[:, p, d]))
                code_BW = vectors_KW[own[-1]]
                sum_BW = code_BW if not d else sums_RdW[: len(code_BW), -1] + code_BW
                rows_R1W = sum_BW.repeat(len(hidden_RH) // len(sum_BW), 1)[:, None]
                sums_RdW = torch.cat([sums_RdW, rows_R1W], 1)
            codes.append(torch.stack(own, -1))
        return torch.stack(codes, 1)


@torch.no_grad()
def draw_places(
    model: DepthModel,
    prompts_ids: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling,
    seed: int | Sequence[int] = 0,
    unconditional_ids: Sequence[int] | None = None,
    compile: str | None = None,
) -> Tensor:
    """Draw the codes of one image per prompt: int64 (B, tokens, 2, R), on the CPU.

    The arguments are those of `smalti.mllm.generation.draw`.
    """
    shape = (tokens, len(BOOKS), model.depth)
    if not prompts_ids:
        return torch.empty((0, *shape), dtype=torch.int64)
    guided = sampling.cfg != 1.0
    count = len(prompts_ids)
    rows = prompt_rows(model.vocabulary, prompts_ids, guided, unconditional_ids)
    decoder = Decoder(model, rows, model.vocabulary.pad, tokens - 1, compile)
    numbers = sample_uniform(seeds_of(seed, count), tokens * len(BOOKS) * model.depth)
    uniform = numbers.view(count, *shape)
    codes = torch.empty((count, *shape), dtype=torch.int64)
    place_R1 = torch.full((len(rows), 1), model.vocabulary.first_visual, device=decoder.device)
    for t in range(tokens):
        drawn_BPR = model.draw_place(decoder.last_RH, sampling, uniform[:, t].to(decoder.device))
        codes[:, t] = drawn_BPR.cpu()
        if t + 1 < tokens:
            drawn_RPR = drawn_BPR.repeat(2 if guided else 1, 1, 1)
            decoder.append(model.inputs_embeds(place_R1, drawn_RPR))
    return codes


class PlaceBuilder(SequenceBuilder):
    """Builds sequences whose images are places of several codes.

    Args:
        hf_tokenizer: see `SequenceBuilder`.
        vocabulary: has one visual token, that of a place.
        num_codes: K.
        code_shape: shape of a place's codes, (2, R).
        settings: see `SequenceBuilder`.
    """

    def __init__(
        self,
        hf_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        *,
        num_codes: int,
        code_shape: tuple[int, ...],
        **settings: Unpack[SequenceSettings],
    ) -> None:
        super().__init__(hf_tokenizer, vocabulary, **settings)
        self.num_codes = num_codes
        self.code_shape = tuple(code_shape)

    def build(self, kind: Kind, row: Row, rng: np.random.Generator) -> TokenSequence:
        """As `SequenceBuilder.build`, with the codes of the places (none in a text)."""
        sequence = super().build(kind, row, rng)
        if kind == "text":
            return replace(sequence, codes=np.empty((0, *self.code_shape), dtype=np.int64))
        return replace(sequence, codes=np.asarray(row["codes"]).astype(np.int64))

    def _image(self, row: Row) -> list[int]:
        codes = np.asarray(row["codes"])
        if codes.shape[1:] != self.code_shape:
            raise VocabularyError(
                f"{source_of(row)} holds codes of the shape {codes.shape}, but this model reads "
                f"(T, {', '.join(map(str, self.code_shape))}). Tokenize again with the tokenizer "
                "that the model was built for."
            )
        if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            raise VocabularyError(
                f"{source_of(row)} holds codes from {int(codes.min())} to {int(codes.max())}, but "
                f"this model has {self.num_codes} in each codebook. Tokenize again with the "
                "tokenizer that the model was built for."
            )
        return super()._image({**row, "codes": np.zeros(len(codes), dtype=np.int64)})
