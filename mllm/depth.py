"""A unified model whose visual places hold several codes (DualToken, arXiv 2503.14324).

An image is T places, each one position of the sequence with the same token, `<IMG_0>`; its codes
ride along. What the language model receives there is the adapter's output of the place's vector
[ẑ_pix ; ẑ_sem]. Two heads, one a codebook, predict the codes of a place from the hidden state
before it, one depth after the other: p(k_d | hidden, k_1 … k_{d−1}).

Axes: B sequences, L positions, N places, P codebooks (2: pixel, semantic), R depth, K codes, W
width of a code, C = P·W, H width of the language model, M sample vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import ConfigError, VocabularyError
from smalti.mllm.generation import Decoder, choose, guidance, prompt_rows, sample_uniform, seeds_of
from smalti.mllm.losses import IGNORE, LossHead
from smalti.mllm.model import Batch, UnifiedModel
from smalti.mllm.rows import WholeRows, root_mean_square
from smalti.mllm.sequences import Kind, Row, SequenceBuilder, TokenSequence
from smalti.mllm.vocabulary import VisualVocabulary
from smalti.schema import DepthHeads
from smalti.tokenizers.dualtoken import BOOKS
from smalti.tokenizers.vit import Transformer, init_linear

if TYPE_CHECKING:
    from smalti.schema import ModelPart, Sampling

SAMPLE = 4096
"""Random places that the adapter is fitted to where no sample of real ones is given."""


class DepthHead(nn.Module):
    """Codes of one codebook at a place.

    A causal transformer over R positions: the first holds the language model's hidden state, the
    d-th the sum of the vectors of the codes before; a classifier of its own for each.
    """

    def __init__(
        self, size: DepthHeads, hidden: int, code_width: int, num_codes: int, depth: int
    ) -> None:
        super().__init__()
        if hidden % size.heads:
            raise ConfigError(
                f"mllm.depth_heads.heads={size.heads} does not divide the language model's width of {hidden}; set a divisor."
            )
        self.code_in = nn.Linear(code_width, hidden)
        self.places = nn.Parameter(torch.randn(depth, hidden) * 0.02)
        self.body = Transformer(hidden, size.layers, size.heads, size.mlp_ratio, causal=True)
        self.classifiers = nn.ModuleList(
            LossHead(hidden, num_codes, bias=False) for _ in range(depth)
        )
        for linear in (self.code_in, *self.classifiers):
            init_linear(linear)

    def outputs(self, hidden_NH: Tensor, sums_NdW: Tensor) -> Tensor:
        """Outputs of the first d + 1 depths, given the sums of their codes so far: (N, d + 1, H)."""
        begun_NdH = self.code_in(sums_NdW.to(self.code_in.weight.dtype))
        x_NdH = torch.cat([hidden_NH[:, None], begun_NdH.to(hidden_NH.dtype)], 1)
        return self.body(x_NdH + self.places[: x_NdH.shape[1]].to(x_NdH.dtype))

    def forward(
        self,
        hidden_NH: Tensor,
        sums_NRW: Tensor,
        codes_NR: Tensor | None = None,
        weights_N: Tensor | None = None,
        chunk: int = 4096,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """With codes (IGNORE where nothing is predicted): Σ weights · losses, differentiable, and
        the losses float32 (N, R); without: logits of the code behind the given sums (N, d, W),
        which may be none: (N, K).
        """
        if codes_NR is None:
            return self.classifiers[sums_NRW.shape[1]](self.outputs(hidden_NH, sums_NRW)[:, -1])
        out_NRH = self.outputs(hidden_NH, sums_NRW[:, :-1])
        parts = [
            classifier(out_NRH[:, d], codes_NR[:, d], weights_N, chunk)
            for d, classifier in enumerate(self.classifiers)
        ]
        return torch.stack([total for total, *_ in parts]).sum(), torch.stack(
            [losses_N for _, losses_N, _ in parts], 1
        )


class DepthModel(UnifiedModel):
    """A causal language model that sees and draws in places of several codes; see the module's
    text.

    code_vectors: both codebooks, (2, K, W); the vocabulary has one visual token, that of a place.
    Parts with rates of their own (`mllm.lr`, `freeze`): the heads belong to `new_rows`, as what
    predicts the new tokens.
    """

    def __init__(
        self,
        causal_lm: Any,
        adapter: Any,
        code_vectors_PKW: Tensor,
        vocabulary: VisualVocabulary,
        *,
        size: DepthHeads,
        depth: int,
        **settings: Any,
    ) -> None:
        super().__init__(causal_lm, adapter, code_vectors_PKW, vocabulary, **settings)
        self.size, self.depth = size, depth
        _, num_codes, width = code_vectors_PKW.shape
        hidden = causal_lm.get_input_embeddings().embedding_dim
        self.heads = nn.ModuleDict(
            {name: DepthHead(size, hidden, width, num_codes, depth) for name in BOOKS}
        )

    def check_vectors(self, code_vectors_VC: Tensor, vocabulary: VisualVocabulary) -> None:
        """VocabularyError unless there are two codebooks and one token for a place."""
        if (
            code_vectors_VC.ndim != 3
            or len(code_vectors_VC) != len(BOOKS)
            or vocabulary.num_codes != 1
        ):
            raise VocabularyError(
                f"Code vectors {tuple(code_vectors_VC.shape)} with {vocabulary.num_codes} visual tokens; expected two codebooks "
                "(2, K, W) and one token for a place. Build the model with the tokenizer that made its tokens."
            )

    @property
    def num_codes(self) -> int:
        """K, codes of each codebook."""
        return self.code_vectors_VC.shape[1]

    @torch.no_grad()
    def start_visual(
        self, head_gain: float = 1.0, chunk: int = 65_536, sample_MC: Tensor | None = None
    ) -> None:
        """Fit the adapter to a sample of places' vectors (default: of random codes), its output at
        the text's scale.
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
        embed_rows = self.matrices.rows(self.lm.get_input_embeddings().weight)
        self.adapter.scale_output(
            float(root_mean_square(embed_rows, self.vocabulary.num_text) / scale)
        )

    def visual_rows(self, start: int, stop: int) -> Tensor:
        """Zeros: what stands at a place depends on its codes, which a plain embedding row does not
        see.
        """
        return self.lm.get_input_embeddings().weight.new_zeros(
            min(stop, 1) - start, self.adapter.out
        )

    def parts(self) -> dict[int, ModelPart]:
        return super().parts() | {id(p): "new_rows" for p in self.heads.parameters()}

    def sums(self, codes_NPR: Tensor) -> Tensor:
        """ẑ_1 … ẑ_R of both codebooks: float32 (N, P, R, W)."""
        parts = [
            F.embedding(codes_NPR[:, p], vectors) for p, vectors in enumerate(self.code_vectors_VC)
        ]
        return torch.stack(parts, 1).cumsum(-2)

    def place_vectors(self, codes_NPR: Tensor) -> Tensor:
        """[ẑ_pix ; ẑ_sem] of places: float32 (N, C)."""
        return self.sums(codes_NPR)[:, :, -1].flatten(1)

    def inputs_embeds(self, ids_BL: Tensor, codes_NPR: Tensor | None = None) -> Tensor:
        """Token ids → (B, L, H); the codes of their visual places come in reading order (None:
        there are no places).
        """
        visual_BL = self.vocabulary.is_visual(ids_BL)
        if codes_NPR is None:
            codes_NPR = ids_BL.new_zeros(0, len(BOOKS), self.depth)
        if len(codes_NPR) != int(visual_BL.sum()):
            raise VocabularyError(
                f"{int(visual_BL.sum())} visual places, but codes of {len(codes_NPR)}."
            )
        return self._embedded(ids_BL, visual_BL, self.place_vectors(codes_NPR))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `UnifiedModel.forward`, on a batch with `codes` int64 (N, 2, R).

        At a predicted place the loss is the sum over both heads and all depths; elsewhere the text
        head's. `loss_image` is a mean over places of that sum, `loss_pixel` and `loss_semantic` are
        its two halves.

        The heads run even where no place is predicted (on one position, with no effect on the
        result), so that every rank of a parallel run does the same communication.
        """
        ids_BL, codes_NPR = batch["input_ids"], batch["codes"]
        hidden_BLH = self._hidden(self.inputs_embeds(ids_BL, codes_NPR), batch)
        hidden_SH, labels_S = hidden_BLH[:, :-1].flatten(0, 1), batch["labels"][:, 1:].reshape(-1)
        answers_S = batch["answer_mask"][:, 1:].reshape(-1) if "answer_mask" in batch else None
        places_S = self.vocabulary.is_visual(labels_S)
        weights_S = self._weights(batch, labels_S, answers_S)
        total, losses_S, correct_S = self.lm.get_output_embeddings()(
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
        divisor = batch["loss_weight"] if "loss_weight" in batch else self.loss_weight(batch)
        return (total + visual) / divisor.clamp_min(1e-6), metrics

    def _place_losses(
        self, hidden_NH: Tensor, codes_NPR: Tensor, weights_N: Tensor, any_1H: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Σ weights · losses of places, differentiable, and the losses float32 (N, P, R)."""
        count = len(codes_NPR)
        sums_NPRW, labels_NPR = self.sums(codes_NPR), codes_NPR
        if not count:
            hidden_NH, weights_N = any_1H, weights_N.new_zeros(1)
            sums_NPRW = sums_NPRW.new_zeros(1, *sums_NPRW.shape[1:])
            labels_NPR = codes_NPR.new_full((1, *codes_NPR.shape[1:]), IGNORE)
        found = [
            head(hidden_NH, sums_NPRW[:, p], labels_NPR[:, p], weights_N, self.loss_chunk)
            for p, head in enumerate(self.heads.values())
        ]
        return torch.stack([total for total, _ in found]).sum(), torch.stack(
            [x for _, x in found], 1
        )[:count].float()

    @torch.no_grad()
    def draw_place(self, hidden_RH: Tensor, sampling: Sampling, uniform_BPR: Tensor) -> Tensor:
        """The codes of one place for each image: int64 (B, 2, R).

        Guidance comes before temperature, top-k and top-p at every depth; conditional rows stand
        above unconditional ones.
        """
        codes = []
        for p, (vectors_KW, head) in enumerate(
            zip(self.code_vectors_VC, self.heads.values(), strict=True)
        ):
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
    """Codes of one image a prompt: int64 (B, tokens, 2, R), on the CPU; see
    `smalti.mllm.generation.draw`.
    """
    shape = (tokens, len(BOOKS), model.depth)
    if not prompts_ids:
        return torch.empty((0, *shape), dtype=torch.int64)
    guided, count = sampling.cfg != 1.0, len(prompts_ids)
    rows = prompt_rows(model.vocabulary, prompts_ids, guided, unconditional_ids)
    decoder = Decoder(model, rows, model.vocabulary.pad, tokens - 1, compile)
    uniform = sample_uniform(seeds_of(seed, count), tokens * len(BOOKS) * model.depth).view(
        count, *shape
    )
    codes = torch.empty((count, *shape), dtype=torch.int64)
    place_R1 = torch.full((len(rows), 1), model.vocabulary.first_visual, device=decoder.device)
    for t in range(tokens):
        drawn_BPR = model.draw_place(decoder.last_RH, sampling, uniform[:, t].to(decoder.device))
        codes[:, t] = drawn_BPR.cpu()
        if t + 1 < tokens:
            decoder.append(
                model.inputs_embeds(place_R1, drawn_BPR.repeat(2 if guided else 1, 1, 1))
            )
    return codes


class PlaceBuilder(SequenceBuilder):
    """Builds sequences whose images are places of several codes: `code_shape` (2, R), each of
    `num_codes`.
    """

    def __init__(
        self, *args: Any, num_codes: int, code_shape: tuple[int, ...], **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.num_codes, self.code_shape = num_codes, tuple(code_shape)

    def build(self, kind: Kind, row: Row, rng: np.random.Generator) -> TokenSequence:
        """As `SequenceBuilder.build`, with the codes of its places (none in a text)."""
        sequence = super().build(kind, row, rng)
        if kind == "text":
            return replace(sequence, codes=np.empty((0, *self.code_shape), dtype=np.int64))
        return replace(sequence, codes=np.asarray(row["codes"]).astype(np.int64))

    def _image(self, row: Mapping[str, Any]) -> list[int]:
        codes = np.asarray(row["codes"])
        if codes.shape[1:] != self.code_shape:
            raise VocabularyError(
                f"A token row holds codes of the shape {codes.shape}, but this model reads (T, "
                f"{', '.join(map(str, self.code_shape))}). Tokenize again with the tokenizer that it was built for."
            )
        if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            raise VocabularyError(
                f"A token row holds codes from {int(codes.min())} to {int(codes.max())}, but this model has {self.num_codes} in "
                "each codebook. Tokenize again with the tokenizer that it was built for."
            )
        return super()._image({**row, "codes": np.zeros(len(codes), dtype=np.int64)})
