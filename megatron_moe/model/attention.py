"""Core attention on `F.scaled_dot_product_attention`, for where Transformer Engine is absent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductAttention(MegatronModule):
    """Causal self-attention with the interface of megatron-core's `DotProductAttention`.

    It follows a mask that keeps it within documents, never holds the scores, takes keys and values of different widths
    (MLA), and under context parallelism attends from this rank's two chunks of the sequence to the gathered keys and
    values.

    Source of the chunk order: mcore 0.16.1, utils.py, get_batch_on_this_cp_rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, k_channels]; s is this rank's part under context parallelism.
            key: [s, b, heads, k_channels].
            value: [s, b, heads, v_channels].
            attention_mask: [b, 1, s, whole s] bool, True where attention is not allowed; None: causal over the whole
                sequence.
            attn_mask_type: unused.
            attention_bias: None, not supported.
            packed_seq_params: None, not supported.

        Returns:
            [s, b, heads * v_channels].
        """
        v_channels = value.shape[-1]
        if query.device.type == "cpu" and query.shape[-1] != v_channels:  # its kernel wants equal widths
            width = max(query.shape[-1], v_channels)
            query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        if self.cp_group.size() == 1:
            output = self._attend(query, key, value, attention_mask)
        else:
            output = self._attend_from_chunks(query, key, value, attention_mask)
        return output[..., :v_channels].flatten(2)  # [s, b, h]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attention of the last tokens of a prefix, [s_q, b, a, d] to [s_k, b, a, d], s_q <= s_k."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, a, s, d]
        mask = None
        if attention_mask is not None:
            mask = ~attention_mask
        elif query.shape[2] != key.shape[2]:
            mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            mask = mask.tril(diagonal=key.shape[2] - query.shape[2])
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return output.permute(2, 0, 1, 3)  # [s, b, a, d]

    def _attend_from_chunks(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (self._gather_in_order(x) for x in (key, value))
        chunk = query.shape[0] // 2
        outputs = []
        masks = (None, None) if attention_mask is None else attention_mask.split(chunk, dim=2)
        for part, mask, index in zip(query.split(chunk), masks, (rank, 2 * size - 1 - rank), strict=True):
            end = (index + 1) * chunk
            outputs.append(self._attend(part, key[:end], value[:end], None if mask is None else mask[..., :end]))
        return torch.cat(outputs)

    def _gather_in_order(self, x: Tensor) -> Tensor:
        """The whole sequence in order, of ranks that hold chunks r and 2 * size - 1 - r of 2 * size."""
        size = self.cp_group.size()
        chunks = gather_from_sequence_parallel_region(x, group=self.cp_group).chunk(2 * size)
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
