"""Steering any transformers model in a notebook: edits as hooks on its decoder blocks, for the length of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from persona_ray.errors import InputError
from persona_ray.spec import Edit


@contextmanager
def attach(blocks: nn.ModuleList, edits: Sequence[Edit]) -> Iterator[None]:
    """Within the `with`, every forward pass is edited; afterwards the model is as before, also after an error.

    `blocks` are the decoder blocks, for most models `model.model.layers`. Several edits of one block act in the order
    given. Raises InputError if an edit names a block that is not there.

        with attach(model.model.layers, [along(axis[20], layer=20, strength=-2.0)]):
            model.generate(...)
    """
    for edit in edits:
        if not 0 <= edit.layer < len(blocks):
            raise InputError(f"an edit is for layer {edit.layer}; this model has layers 0 to {len(blocks) - 1}")
    with ExitStack() as hooks:
        for edit in edits:
            hooks.callback(blocks[edit.layer].register_forward_hook(_hook(edit)).remove)
        yield


def _hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    def change_output(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        # Blocks of older transformers, and of some models' own code, answer (hidden, ...).
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return change_output
