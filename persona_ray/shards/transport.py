"""Hidden states as numpy arrays: what travels between processes.

A torch tensor is pickled in-band, with its whole storage even for a view; a numpy array crosses Ray's object store without a
copy on the reader's side. numpy has no bfloat16, so its bits travel as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_array(hidden: Tensor) -> npt.NDArray[Any]:
    """The tensor's values on the host; bfloat16 as its bits in uint16."""
    host = hidden.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.uint16).numpy()
    return host.numpy()


def to_tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The inverse of `to_array`, on `device`."""
    if not array.flags.writeable:  # arrays from the object store are read-only, which torch cannot express
        array = array.copy()
    tensor = torch.from_numpy(array)
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)
