"""The unified model: a causal language model whose visual inputs come from an adapter over code
vectors.

Axes: B sequences, L positions, N visual positions, C width of a code vector, H width of the
language model.

Visual tokens have no trained embedding rows: their input is `adapter(code_vectors[code])`, for
understanding and generation alike, so while it trains the embedding matrix ends before the first
visual id (for 7B and 196,608 codes that saves 0.7B parameters). The output head covers the whole
flat vocabulary. The export writes the adapter's outputs into the missing rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.errors import VocabularyError
from smalti.mllm.adapters import Adapter
from smalti.mllm.losses import IGNORE, LossHead, ScaledRows
from smalti.mllm.rows import Matrices, WholeMatrices, WholeRows, grow, ranges, root_mean_square
from smalti.mllm.vocabulary import VisualVocabulary

if TYPE_CHECKING:
    from smalti.schema import ModelPart

Batch = Mapping[str, Tensor]


class UnifiedModel(nn.Module):
    """A causal language model that sees and draws; see the module's text.

    `causal_lm` is taken over and, unless it was fitted before, changed by `fit_vocabulary`: its
    embedding matrix is cut or grown to the text and delimiter rows, its head is untied and grown to
    the flat vocabulary (new rows from `seed`).
    """

    code_vectors_VC: Tensor

    def __init__(
        self,
        causal_lm: Any,
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
        self.image_loss_weight, self.answer_loss_weight = image_loss_weight, answer_loss_weight
        self.loss_chunk = loss_chunk
        self.one_row = False
        self.old_rows: ScaledRows | None = None
        self._frozen: set[ModelPart] | None = None
        adapter.allocate(vocabulary.num_codes, matrices)
        held = (
            code_vectors_VC.new_empty(0, code_vectors_VC.shape[1])
            if adapter.own_codes
            else code_vectors_VC
        )
        self.register_buffer("code_vectors_VC", held.detach().float().clone(), persistent=False)
        if not is_fitted(causal_lm, vocabulary):
            fit_vocabulary(causal_lm, vocabulary, torch.Generator().manual_seed(seed), matrices)

    def check_vectors(self, code_vectors_VC: Tensor, vocabulary: VisualVocabulary) -> None:
        """VocabularyError unless there is a vector for each visual token."""
        if code_vectors_VC.shape[0] != vocabulary.num_codes:
            raise VocabularyError(
                f"The visual tokenizer has {code_vectors_VC.shape[0]} code vectors, but the language model's vocabulary "
                f"has {vocabulary.num_codes} visual codes. Both must come from the same visual tokenizer."
            )

    @property
    def config(self) -> Any:
        """The language model's configuration (DeepSpeed looks for it here)."""
        return self.lm.config

    @torch.no_grad()
    def start_visual(
        self, head_gain: float = 1.0, chunk: int = 65_536, codes_VC: Tensor | None = None
    ) -> None:
        """Start the visual side from the codebook, at the scales of the text side.

        The adapter is fitted to the code vectors and its output scaled to the root mean square of
        the text embedding. The head's visual rows start as the directions of the adapter's outputs,
        much as a tied embedding would have them, all at `head_gain` times the root mean square of
        its text rows: codes that lie close begin alike in the output as well, and what is learned
        of one counts for its neighbours. Random rows would each have to be learned by themselves.

        codes_VC: the visual tokenizer's codebook, where the adapter holds code vectors of its own.
        """
        codes_VC = self.code_vectors_VC if codes_VC is None else codes_VC
        self.adapter.fit(codes_VC, self.matrices)
        head = self.lm.get_output_embeddings()
        embed_rows, head_rows = (
            self.matrices.rows(matrix.weight) for matrix in (self.lm.get_input_embeddings(), head)
        )
        num_text = self.vocabulary.num_text
        sample = torch.linspace(0, len(codes_VC) - 1, min(4096, len(codes_VC))).long()
        vectors_NH = self.adapter.from_vectors(codes_VC[sample])
        scale = root_mean_square(WholeRows(vectors_NH), len(vectors_NH)).clamp_min(1e-12)
        self.adapter.scale_output(float(root_mean_square(embed_rows, num_text) / scale))
        size = float(head_gain * root_mean_square(head_rows, num_text) * head.in_features**0.5)
        for start, stop in ranges(0, self.vocabulary.num_codes, head_rows.step or chunk):
            rows_nH = (
                F.normalize(self.adapter.from_vectors(codes_VC[start:stop]).float(), dim=-1) * size
            )
            head_rows.write(self.vocabulary.first_visual + start, rows_nH)

    def visual_inputs(self, codes: Tensor) -> Tensor:
        """What stands in place of the embedding rows of visual codes, int64 (…): (…, H)."""
        return self.adapter(self._adapted(codes))

    def _adapted(self, codes: Tensor) -> Tensor:
        """What the adapter takes for codes: their vectors, or the codes themselves where the
        vectors are its own.
        """
        return codes if self.adapter.own_codes else self.code_vectors_VC[codes]

    def inputs_embeds(self, ids_BL: Tensor) -> Tensor:
        """Token ids (any in the flat vocabulary) → (B, L, H): embedding rows for text, adapter
        outputs for visual ids.
        """
        visual_BL = self.vocabulary.is_visual(ids_BL)
        codes_N = ids_BL[visual_BL] - self.vocabulary.first_visual
        return self._embedded(ids_BL, visual_BL, self._adapted(codes_N))

    def _embedded(self, ids_BL: Tensor, visual_BL: Tensor, adapted_N: Tensor) -> Tensor:
        """Embedding rows for text, the adapter's outputs of `adapted` (N, …) at the visual places:
        (B, L, H).

        The adapter runs even where there is no visual id (on zeros, with no effect on the result),
        so that every rank of a parallel run does the same communication.
        """
        embeds_BLH = self.lm.get_input_embeddings()(
            ids_BL.masked_fill(visual_BL, self.vocabulary.boi)
        )
        if self.old_rows is not None:
            embeds_BLH = torch.where(
                (ids_BL < self.old_rows.rows)[..., None],
                embeds_BLH * self.old_rows.factor,
                embeds_BLH,
            )
        if not len(adapted_N):
            nothing = adapted_N.new_zeros(1, *adapted_N.shape[1:])
            return embeds_BLH + 0 * self.adapter(nothing).sum().to(embeds_BLH.dtype)
        vectors_NH = self.adapter(adapted_N).to(embeds_BLH.dtype)
        return embeds_BLH.masked_scatter(visual_BL[..., None], vectors_NH)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean next-token loss over the batch's labels, visual ones weighing `image_loss_weight`
        and those of answers `answer_loss_weight`, and its parts.

        batch: `input_ids`, `labels` (IGNORE where nothing is predicted), `attention_mask`, all
        int64 (B, L), padded on the right; optional `answer_mask` bool (B, L); optional
        `position_ids`, `document_ids` and `segment_ids` (see `visible_mask`); optional
        `image_loss_weight` and `answer_loss_weight`, scalars in place of the model's own; optional
        `loss_weight`, a scalar that the weighted sum is divided by in place of this batch's own
        `loss_weight(batch)`. To average correctly over micro-batches and ranks of unequal label
        counts, give each of them the global batch's total weight divided by their number.

        Metrics (detached, float32, 0-d): `loss_text` and `loss_image` (unweighted means),
        `tokens_text` and `tokens_image` (their counts, to weigh means by), and with `answer_mask`
        `answer_accuracy` and `tokens_answer`. A mean over no token is 0 beside a count of 0.
        """
        embeds_BLH = self.inputs_embeds(batch["input_ids"])
        hidden_BLH = self._hidden(embeds_BLH, batch)
        labels_N = batch["labels"][:, 1:].reshape(-1)
        answers = batch["answer_mask"][:, 1:].reshape(-1) if "answer_mask" in batch else None
        total, losses_N, correct_N = self.lm.get_output_embeddings()(
            hidden_BLH[:, :-1].flatten(0, 1),
            labels_N,
            self._weights(batch, labels_N, answers),
            self.loss_chunk,
        )
        divisor = batch["loss_weight"] if "loss_weight" in batch else self.loss_weight(batch)
        return total / divisor.clamp_min(1e-6), self._metrics(
            labels_N, losses_N, correct_N, answers
        )

    @property
    def num_codes(self) -> int:
        """Codes of the visual tokenizer that it was built for."""
        return self.vocabulary.num_codes

    def visual_rows(self, start: int, stop: int) -> Tensor:
        """Embedding rows that stand for visual tokens in a plain language model: (n, H)."""
        stop = min(stop, self.vocabulary.num_codes)
        return self.visual_inputs(
            torch.arange(start, stop, device=self.lm.get_input_embeddings().weight.device)
        )

    def parts(self) -> dict[int, ModelPart]:
        """`id` of each parameter → the part of the model that it belongs to."""
        matrices = (self.lm.get_input_embeddings(), self.lm.get_output_embeddings())
        found: dict[int, ModelPart] = {id(p): "backbone" for p in self.parameters()}
        found |= {id(p): "new_rows" for matrix in matrices for p in matrix.parameters()}
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
        """What the backbone makes of a batch: (B, L, H).

        With flash-attention, packed rows become one without padding, in which each document begins
        at position 0: transformers sees from that where it begins.
        """
        if "document_ids" in batch and self.one_row:
            held_BL = batch["document_ids"] >= 0
            out_1NH = self.backbone(
                inputs_embeds=embeds_BLH[held_BL][None],
                position_ids=batch["position_ids"][held_BL][None],
                use_cache=False,
            ).last_hidden_state
            return torch.zeros_like(embeds_BLH, dtype=out_1NH.dtype).masked_scatter(
                held_BL[..., None], out_1NH
            )
        mask = batch["attention_mask"]
        if "document_ids" in batch:
            mask = visible_mask(batch["document_ids"], batch["segment_ids"], embeds_BLH.dtype)
        return self.backbone(
            inputs_embeds=embeds_BLH,
            attention_mask=mask,
            position_ids=batch.get("position_ids"),
            use_cache=False,
        ).last_hidden_state

    @property
    def backbone(self) -> nn.Module:
        """The language model without its head."""
        return self.lm.base_model

    def loss_weight(self, batch: Batch) -> Tensor:
        """Summed weight of a batch's labels that count (the first position predicts nothing): a 0-d
        float32 tensor.
        """
        answers = batch["answer_mask"][:, 1:] if "answer_mask" in batch else None
        return self._weights(batch, batch["labels"][:, 1:], answers).sum()

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


def visible_mask(documents_BL: Tensor, segments_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, L, L): causal, and only within a document; there segment k > 0
    sees itself and what is shared (segment 0), not the other segments.

    Document −1 is padding, which sees itself alone (a row without any key would be NaN).
    """
    length = segments_BL.shape[1]
    queries_BL1, keys_B1L = segments_BL[:, :, None], segments_BL[:, None, :]
    seen_BLL = (documents_BL[:, :, None] == documents_BL[:, None, :]) & (documents_BL >= 0)[
        :, :, None
    ]
    seen_BLL &= (keys_B1L == queries_BL1) | (keys_B1L == 0)
    seen_BLL &= torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    seen_BLL |= torch.eye(length, dtype=torch.bool, device=segments_BL.device)
    mask_BLL = torch.zeros(seen_BLL.shape, dtype=dtype, device=segments_BL.device)
    return mask_BLL.masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]


_NEUTRAL = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def check_supported(causal_lm: Any) -> None:
    """Raise VocabularyError for a language model whose logits are not simply `head(hidden)` or
    whose embedding rescales.

    Loss, drawing and the embedding swap all rest on these two.
    """
    text_config = causal_lm.config.get_text_config()
    for key, neutral in _NEUTRAL.items():
        found = getattr(text_config, key, neutral)
        if found not in (None, neutral):
            raise VocabularyError(
                f"{type(causal_lm).__name__} has {key}={found}: its logits are not a plain linear head, which this project "
                f"does not support. Use a model such as Qwen2, Qwen3, Llama or Mistral."
            )
    embed, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if not isinstance(embed, nn.Embedding) or not isinstance(head, nn.Linear):
        raise VocabularyError(
            f"{type(causal_lm).__name__} has no plain token embedding and linear head "
            f"({type(embed).__name__}, {type(head).__name__}). Use a model such as Qwen2, Qwen3, Llama or Mistral."
        )
    with torch.no_grad():
        probe = torch.zeros(1, dtype=torch.int64, device=embed.weight.device)
        here = (
            embed.weight.device.type != "meta" and embed.weight.numel() > 0
        )  # neither without storage nor in parts
        if here and not torch.equal(embed(probe), embed.weight[:1]):
            raise VocabularyError(
                f"{type(causal_lm).__name__} rescales its embedding rows, which the embedding swap cannot undo. "
                f"Use a model such as Qwen2, Qwen3, Llama or Mistral."
            )


def fit_vocabulary(
    causal_lm: Any, vocabulary: VisualVocabulary, generator: torch.Generator, matrices: Matrices
) -> None:
    """Give a language model rows for the flat vocabulary, in place, and untie its head.

    Embedding: rows [0, first_visual). Head: at least `vocabulary.size` rows (a published model's
    padding rows are kept where they reach beyond). Rows from `num_text` on are new: normal, with
    the text rows' mean vector and one deviation.
    """
    embed, old_head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    num_text = vocabulary.num_text
    if embed.num_embeddings < num_text:
        raise VocabularyError(
            f"The tokenizer has {num_text} text tokens, but the language model only {embed.num_embeddings} embedding rows: "
            f"they do not belong together. Load both from the same folder."
        )
    num_head = max(vocabulary.size, old_head.out_features)
    bias = old_head.bias is not None
    if hasattr(old_head.bias, "ds_tensor"):
        raise VocabularyError(
            f"The head of {type(causal_lm).__name__} has a bias, which cannot grow while the model lies in parts. "
            "Set mllm.train.zero_stage to 2 or lower."
        )
    head = LossHead(old_head.in_features, num_head, bias=bias, device="meta")

    def grown(old: nn.Parameter, total: int) -> nn.Parameter:
        new, width = matrices.empty(old, total), matrices.shape(old)[1]
        grow(matrices.rows(old), matrices.rows(new), num_text, total, width, generator)
        return new

    head.weight = grown(old_head.weight, num_head)
    if bias:
        column = nn.Parameter(old_head.bias.detach()[:, None])
        head.bias = nn.Parameter(grown(column, num_head).detach()[:, 0].contiguous())
    embed.weight = grown(embed.weight, vocabulary.first_visual)
    embed.num_embeddings, embed.padding_idx = vocabulary.first_visual, None
    causal_lm.set_output_embeddings(head)
    untie(causal_lm, num_head)
    end_at(causal_lm, vocabulary)


def end_at(causal_lm: Any, vocabulary: VisualVocabulary) -> None:
    """Let `generate` of the exported model know the end, padding and beginning tokens; a published
    model's own ends stay.
    """
    generation = causal_lm.generation_config
    found = generation.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    generation.eos_token_id = ends if vocabulary.eos in ends else [*ends, vocabulary.eos]
    if generation.pad_token_id is None:
        generation.pad_token_id = vocabulary.pad
    if generation.bos_token_id is None and vocabulary.bos is not None:
        generation.bos_token_id = vocabulary.bos


def is_fitted(causal_lm: Any, vocabulary: VisualVocabulary) -> bool:
    """Whether `fit_vocabulary` (or `fit_shapes`) was here before."""
    embed, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return (
        isinstance(head, LossHead)
        and head.out_features >= vocabulary.size
        and embed.num_embeddings == vocabulary.first_visual
    )


def fit_shapes(causal_lm: Any, vocabulary: VisualVocabulary) -> None:
    """As `fit_vocabulary`, for a language model whose weights are still to be loaded: shapes only,
    no storage.
    """
    embed, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    embed.weight = nn.Parameter(
        embed.weight.new_empty((vocabulary.first_visual, embed.embedding_dim), device="meta")
    )
    embed.num_embeddings, embed.padding_idx = vocabulary.first_visual, None
    num_head = max(vocabulary.size, head.out_features)
    causal_lm.set_output_embeddings(
        LossHead(head.in_features, num_head, bias=head.bias is not None, device="meta")
    )
    untie(causal_lm, num_head)


def untie(causal_lm: Any, vocab_size: int) -> None:
    """Record in a language model that its head is its own and how many ids it has."""
    for config in (causal_lm.config, causal_lm.config.get_text_config()):
        config.tie_word_embeddings = False
        config.vocab_size = vocab_size
    causal_lm.all_tied_weights_keys = {}
    if hasattr(causal_lm, "vocab_size"):
        causal_lm.vocab_size = vocab_size
