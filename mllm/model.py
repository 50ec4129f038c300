"""The unified model: a causal language model whose visual inputs come from an adapter.

Visual tokens have no trained embedding rows. Their input, for understanding and for generation, is
`adapter(code_vectors[code])`; so during training the embedding matrix ends before the first visual
id (for 7B and 196,608 codes that saves 0.7B parameters). The output head covers the whole flat
vocabulary. The export writes the adapter's outputs into the missing rows.

Axes: B sequences, L positions, N positions of a batch in one row, C width of a code vector, H width
of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from smalti.errors import VocabularyError
from smalti.mllm.adapters import Adapter
from smalti.mllm.language_model import (
    check_supported,
    fit_vocabulary,
    input_embedding,
    is_fitted,
)
from smalti.mllm.losses import IGNORE, LossHead, ScaledRows
from smalti.mllm.packing import visible_mask
from smalti.mllm.rows import Matrices, WholeMatrices, WholeRows, ranges, root_mean_square
from smalti.mllm.vocabulary import VisualVocabulary

if TYPE_CHECKING:
    from smalti.schema import ModelPart

Batch = Mapping[str, Tensor]


class ModelSettings(TypedDict, total=False):
    """Optional arguments of a `UnifiedModel`."""

    image_loss_weight: float
    answer_loss_weight: float
    loss_chunk: int
    seed: int
    matrices: Matrices


class UnifiedModel(nn.Module):
    """A causal language model that sees and draws; see the module's docstring.

    Args:
        causal_lm: owned by the model from here on. Unless it was fitted before, `fit_vocabulary`
            changes it: its embedding is cut or grown to the text and delimiter rows, its head is
            untied and grown to the flat vocabulary.
        adapter: maps code vectors to H.
        code_vectors_VC: the visual tokenizer's codebook.
        vocabulary: layout of the flat vocabulary.
        image_loss_weight: weight of the loss on visual tokens.
        answer_loss_weight: weight of the loss on answers.
        loss_chunk: positions whose logits exist at once.
        seed: of the new rows.
        matrices: how embedding and head are stored.

    Raises:
        VocabularyError: if the parts do not belong together, or if the language model is not
            supported.
    """

    code_vectors_VC: Tensor

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        adapter: Adapter,
        code_vectors_VC: Tensor,
        vocabulary: VisualVocabulary,
        *,
        image_loss_weight: float = 1.0,
        answer_loss_weight: float = 1.0,
        loss_chunk: int = 4096,
        seed: int = 0,
        matrices: Matrices = WholeMatrices(),  # noqa: B008 (has no state)
    ) -> None:
        super().__init__()
        self.matrices = matrices
        self.check_vectors(code_vectors_VC, vocabulary)
        check_supported(causal_lm)
        self.lm = causal_lm
        self.adapter = adapter
        self.vocabulary = vocabulary
        self.image_loss_weight = image_loss_weight
        self.answer_loss_weight = answer_loss_weight
        self.loss_chunk = loss_chunk
        self.one_row = False
        self.old_rows: ScaledRows | None = None
        self._frozen: set[ModelPart] | None = None
        adapter.allocate(vocabulary.num_codes, matrices)
        if adapter.own_codes:
            code_vectors_VC = code_vectors_VC.new_empty(0, code_vectors_VC.shape[1])
        vectors_VC = code_vectors_VC.detach().float().clone()
        self.register_buffer("code_vectors_VC", vectors_VC, persistent=False)
        if not is_fitted(causal_lm, vocabulary):
            fit_vocabulary(causal_lm, vocabulary, torch.Generator().manual_seed(seed), matrices)

    def check_vectors(self, code_vectors_VC: Tensor, vocabulary: VisualVocabulary) -> None:
        """Raise VocabularyError unless each visual token has a code vector."""
        if code_vectors_VC.shape[0] != vocabulary.num_codes:
            raise VocabularyError(
                f"The visual tokenizer has {code_vectors_VC.shape[0]} code vectors, but the "
                f"language model's vocabulary has {vocabulary.num_codes} visual codes. Both must "
                "come from the same visual tokenizer."
            )

    @property
    def config(self) -> PreTrainedConfig:
        """The language model's configuration (DeepSpeed looks for it here)."""
        return self.lm.config

    @property
    def backbone(self) -> nn.Module:
        """The language model without its head."""
        return self.lm.base_model

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of text tokens and delimiters."""
        return input_embedding(self.lm)

    @property
    def head(self) -> LossHead:
        """The output head over the flat vocabulary."""
        head = self.lm.get_output_embeddings()
        assert isinstance(head, LossHead), type(head)
        return head

    @property
    def num_codes(self) -> int:
        """Number of codes of the visual tokenizer."""
        return self.vocabulary.num_codes

    @torch.no_grad()
    def start_visual(
        self, head_gain: float = 1.0, chunk: int = 65_536, codes_VC: Tensor | None = None
    ) -> None:
        """Initialise the visual side from the codebook, at the scales of the text side.

        The adapter is fitted to the code vectors, and its output is scaled to the root mean square
        of the text embedding. The head's visual rows start as the directions of the adapter's
        outputs, much as in a tied embedding: codes that lie close start close in the output as
        well, and what is learned for one counts for its neighbours. Random rows would each have to
        be learned by themselves.

        Args:
            head_gain: the head's visual rows get this times the root mean square of its text rows.
            chunk: rows of the head that are written at once, if it is whole.
            codes_VC: the visual tokenizer's codebook, for an adapter that holds code vectors of its
                own.
        """
        codes_VC = self.code_vectors_VC if codes_VC is None else codes_VC
        self.adapter.fit(codes_VC, self.matrices)
        head = self.head
        embed_rows = self.matrices.rows(self.embedding.weight)
        head_rows = self.matrices.rows(head.weight)
        num_text = self.vocabulary.num_text
        sample = torch.linspace(0, len(codes_VC) - 1, min(4096, len(codes_VC))).long()
        vectors_NH = self.adapter.from_vectors(codes_VC[sample])
        scale = root_mean_square(WholeRows(vectors_NH), len(vectors_NH)).clamp_min(1e-12)
        self.adapter.scale_output(float(root_mean_square(embed_rows, num_text) / scale))
        size = float(head_gain * root_mean_square(head_rows, num_text) * head.in_features**0.5)
        for start, stop in ranges(0, self.vocabulary.num_codes, head_rows.step or chunk):
            vectors_nH = self.adapter.from_vectors(codes_VC[start:stop]).float()
            head_rows.write(
                self.vocabulary.first_visual + start, F.normalize(vectors_nH, dim=-1) * size
            )

    def visual_inputs(self, codes: Tensor) -> Tensor:
        """The inputs that replace embedding rows of visual codes: int64 (…) → (…, H)."""
        return self.adapter(self._adapter_input(codes))

    def _adapter_input(self, codes: Tensor) -> Tensor:
        """Code vectors, or the codes if the adapter holds the vectors."""
        return codes if self.adapter.own_codes else self.code_vectors_VC[codes]

    def inputs_embeds(self, ids_BL: Tensor) -> Tensor:
        """Embed token ids of the flat vocabulary: (B, L) → (B, L, H).

        Text gets embedding rows, visual ids the adapter's outputs.
        """
        visual_BL = self.vocabulary.is_visual(ids_BL)
        codes_N = ids_BL[visual_BL] - self.vocabulary.first_visual
        return self._embedded(ids_BL, visual_BL, self._adapter_input(codes_N))

    def _embedded(self, ids_BL: Tensor, visual_BL: Tensor, adapted_N: Tensor) -> Tensor:
        """Embed ids; the adapter maps `adapted` (N, …) to the visual places: (B, L, H).

        The adapter runs even if there is no visual id (on zeros, with no effect on the result), so
        that every rank of a parallel run does the same communication.
        """
        embeds_BLH = self.embedding(ids_BL.masked_fill(visual_BL, self.vocabulary.boi))
        if self.old_rows is not None:
            old_BL1 = (ids_BL < self.old_rows.rows)[..., None]
            embeds_BLH = torch.where(old_BL1, embeds_BLH * self.old_rows.factor, embeds_BLH)
        if not len(adapted_N):
            zeros = adapted_N.new_zeros(1, *adapted_N.shape[1:])
            return embeds_BLH + 0 * self.adapter(zeros).sum().to(embeds_BLH.dtype)
        vectors_NH = self.adapter(adapted_N).to(embeds_BLH.dtype)
        return embeds_BLH.masked_scatter(visual_BL[..., None], vectors_NH)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean of the next-token loss over the batch's labels, and metrics.

        Visual labels weigh `image_loss_weight`, answers `answer_loss_weight`, others 1. To average
        correctly over micro-batches and ranks of unequal label counts, give each of them the global
        batch's total weight divided by their number as `loss_weight`.

        Args:
            batch: `input_ids`, `labels` (IGNORE where nothing is predicted) and `attention_mask`,
                all int64 (B, L), padded on the right. Optional: `answer_mask` bool (B, L);
                `position_ids`, `document_ids` and `segment_ids` (see `visible_mask`); the scalars
                `image_loss_weight` and `answer_loss_weight` in place of the model's own; the scalar
                `loss_weight`, by which the weighted sum is divided in place of this batch's
                `loss_weight(batch)`.

        Returns:
            The loss, and metrics (detached, float32, 0-d): `loss_text` and `loss_image` (unweighted
            means), `tokens_text` and `tokens_image` (their counts, to weigh means by), and with
            `answer_mask` also `answer_accuracy` and `tokens_answer`. A mean over no token is 0, and
            its count 0.
        """
        hidden_BLH = self._hidden(self.inputs_embeds(batch["input_ids"]), batch)
        labels_N = batch["labels"][:, 1:].reshape(-1)
        answers_N = batch["answer_mask"][:, 1:].reshape(-1) if "answer_mask" in batch else None
        total, losses_N, correct_N = self.head(
            hidden_BLH[:, :-1].flatten(0, 1),
            labels_N,
            self._weights(batch, labels_N, answers_N),
            self.loss_chunk,
        )
        metrics = self._metrics(labels_N, losses_N, correct_N, answers_N)
        return total / self._divisor(batch), metrics

    def visual_rows(self, start: int, stop: int) -> Tensor:
        """Embedding rows of visual codes for a plain language model: (n, H)."""
        stop = min(stop, self.vocabulary.num_codes)
        return self.visual_inputs(torch.arange(start, stop, device=self.embedding.weight.device))

    def parts(self) -> dict[int, ModelPart]:
        """`id` of each parameter → its part of the model."""
        found: dict[int, ModelPart] = {id(p): "backbone" for p in self.parameters()}
        for matrix in (self.embedding, self.head):
            found |= {id(p): "new_rows" for p in matrix.parameters()}
        return found | {id(p): "adapter" for p in self.adapter.parameters()}

    def freeze(self, parts: Sequence[ModelPart]) -> None:
        """Freeze parts for the whole training: no gradients, no optimizer states."""
        part_of = self.parts()
        for parameter in self.parameters():
            if part_of[id(parameter)] in parts:
                parameter.requires_grad_(False)

    def rate_parts(self) -> dict[int, ModelPart]:
        """Parts that need parameter groups of their own: all after `split_rates`, else none."""
        return self.parts() if self._frozen is not None else {}

    def split_rates(self) -> None:
        """Allow each part its own learning rate, and `set_frozen`."""
        self._frozen = set()
        part_of = self.parts()
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._frozen_to_zero, part_of[id(parameter)]))

    def set_frozen(self, parts: Sequence[ModelPart]) -> None:
        """Freeze these parts from now on, and unfreeze all others.

        The gradients of a frozen part are zero, so it neither moves nor counts in the gradient
        norm. Unlike after `freeze`, it keeps its gradients and optimizer states.
        """
        self._frozen = set(parts)

    def _frozen_to_zero(self, part: ModelPart, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad) if part in (self._frozen or ()) else grad

    def _hidden(self, embeds_BLH: Tensor, batch: Batch) -> Tensor:
        """The backbone's last hidden states of a batch: (B, L, H).

        With flash-attention, packed rows are joined to one row without padding, in which each
        document starts at position 0: that is how transformers finds the documents' boundaries.
        """
        if "document_ids" in batch and self.one_row:
            held_BL = batch["document_ids"] >= 0
            out_1NH = self.backbone(
                inputs_embeds=embeds_BLH[held_BL][None],
                position_ids=batch["position_ids"][held_BL][None],
                use_cache=False,
            ).last_hidden_state
            hidden_BLH = torch.zeros_like(embeds_BLH, dtype=out_1NH.dtype)
            return hidden_BLH.masked_scatter(held_BL[..., None], out_1NH)
        mask = batch["attention_mask"]
        if "document_ids" in batch:
            mask = visible_mask(batch["document_ids"], batch["segment_ids"], embeds_BLH.dtype)
        return self.backbone(
            inputs_embeds=embeds_BLH,
            attention_mask=mask,
            position_ids=batch.get("position_ids"),
            use_cache=False,
        ).last_hidden_state

    def loss_weight(self, batch: Batch) -> Tensor:
        """Total weight of a batch's labels: 0-d float32.

        The first position has no label.
        """
        answers = batch["answer_mask"][:, 1:] if "answer_mask" in batch else None
        return self._weights(batch, batch["labels"][:, 1:], answers).sum()

    def _divisor(self, batch: Batch) -> Tensor:
        weight = batch["loss_weight"] if "loss_weight" in batch else self.loss_weight(batch)
        return weight.clamp_min(1e-6)

    def _weights(self, batch: Batch, labels: Tensor, answers: Tensor | None) -> Tensor:
        image = batch.get("image_loss_weight", self.image_loss_weight)
        weights = torch.where(self.vocabulary.is_visual(labels), image, (labels != IGNORE).float())
        if answers is not None:
            answer = batch.get("answer_loss_weight", self.answer_loss_weight)
            weights = torch.where((labels != IGNORE) & answers.bool(), answer, weights)
        return weights

    def _metrics(
        self, labels_N: Tensor, losses_N: Tensor, correct_N: Tensor, answers_N: Tensor | None
    ) -> dict[str, Tensor]:
        counted_N = labels_N != IGNORE
        image_N = self.vocabulary.is_visual(labels_N)
        metrics = {}
        for name, where_N in (("text", counted_N & ~image_N), ("image", image_N)):
            count = where_N.sum().float()
            metrics[f"loss_{name}"] = losses_N.float()[where_N].sum() / count.clamp_min(1)
            metrics[f"tokens_{name}"] = count
        if answers_N is not None:
            where_N = answers_N.bool() & counted_N
            count = where_N.sum().float()
            metrics["answer_accuracy"] = correct_N[where_N].sum() / count.clamp_min(1)
            metrics["tokens_answer"] = count
        return metrics
