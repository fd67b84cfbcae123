"""The state of an aggregator or a weighting from a checkpoint of torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

import torch
from torch import Tensor


def load_state(checkpoint: str | PathLike[str], prefix: str) -> dict[str, Tensor]:
    """Reads a state dict that `torch.distributed.checkpoint.save` wrote, on any number of ranks.

    A method's state is made in its first step, so that a new method has no tensors into which
    `torch.distributed.checkpoint.load` could read. State that belongs to parameters was saved in parts by the ranks,
    each its own one, and is returned whole. The method takes this rank's part of it in its next step.

    Args:
        checkpoint: the folder of the checkpoint.
        prefix: under which name the state dict was saved, such as "aggregator".

    Returns:
        Tensors on the CPU, for `load_state_dict`.

    Raises:
        ValueError: nothing was saved under the name.

    Memory: the whole state, which for methods with state for each parameter is K * P. Cost: one read of the files.

    Example, on all ranks::

        torch.distributed.checkpoint.save({"aggregator": aggregator.state_dict()}, checkpoint_id=folder)
        ...
        aggregator.load_state_dict(mtlfast.distributed.load_state(folder, "aggregator"))
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    start = f"{prefix}."
    state: dict[str, Any] = {}
    for name, metadata in saved.items():
        if name.startswith(start) and isinstance(metadata, TensorStorageMetadata):
            state[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
    if not state:
        raise ValueError(f"load_state: the checkpoint has nothing under {prefix!r}, expected a state dict")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in a single process
        load(state, checkpoint_id=checkpoint)
    return {name.removeprefix(start): tensor for name, tensor in state.items()}
