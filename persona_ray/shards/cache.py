"""The key-value cache of one stage.

transformers reads a cache's length and mask sizes from layer 0, which a later stage never fills: with the stock cache such
a stage generates nonsense on padded batches. This one answers from a layer that the stage owns.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PretrainedConfig


class StageCache(DynamicCache):  # type: ignore[misc]
    """KV cache for decoder blocks [first_layer, end_layer)."""

    def __init__(self, config: PretrainedConfig, first_layer: int, end_layer: int) -> None:
        super().__init__(config=config)
        self.owned_layers = range(first_layer, end_layer)

    def _owned(self, layer_idx: int) -> int:
        """`layer_idx` itself, or the first owned layer of the same kind (full or sliding attention)."""
        if layer_idx in self.owned_layers:
            return layer_idx
        kind = type(self.layers[layer_idx]) if layer_idx < len(self.layers) else None
        return next((i for i in self.owned_layers if type(self.layers[i]) is kind), self.owned_layers.start)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return int(super().get_seq_length(self._owned(layer_idx)))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset for the attention mask."""
        return super().get_mask_sizes(query_length, self._owned(layer_idx))  # type: ignore[no-any-return]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query."""
        return super().get_query_offset(self._owned(layer_idx))  # type: ignore[no-any-return]

    def keep(self, rows: list[int]) -> None:
        """Forget all sequences but `rows`, in that order."""
        for layer in self.owned_layers:
            self.layers[layer].batch_select_indices(torch.tensor(rows, device=self.layers[layer].keys.device))
