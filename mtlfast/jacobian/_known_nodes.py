"""The nodes of the autograd graph whose private fields the implicit way reads, and whether this torch has them."""

from __future__ import annotations

from typing import Any

import torch

from mtlfast import _native

# For each type of node the fields that are read. Their names are not public, so that each version of torch is listed.
FIELDS: dict[str, frozenset[str]] = {
    "AddmmBackward0": frozenset({"_saved_mat1", "_saved_mat2", "_saved_alpha", "_raw_saved_mat1", "_raw_saved_mat2"}),
    "MmBackward0": frozenset({"_saved_self", "_saved_mat2", "_raw_saved_self", "_raw_saved_mat2"}),
    "EmbeddingBackward0": frozenset(
        {"_saved_indices", "_saved_padding_idx", "_saved_scale_grad_by_freq", "_saved_sparse", "_raw_saved_indices"}
    ),
    "TBackward0": frozenset(),
    "ToCopyBackward0": frozenset(),
    "TransposeBackward0": frozenset({"_saved_dim0", "_saved_dim1"}),
    "PermuteBackward0": frozenset({"_saved_dims"}),
}
OF_EVERY_NODE = frozenset({"_input_metadata", "_sequence_nr", "next_functions"})
TABLE: dict[str, dict[str, frozenset[str]]] = dict.fromkeys(("2.11", "2.12", "2.13", "2.14"), FIELDS)


def unreadable(version: str, examples: dict[str, Any]) -> str | None:
    """Why the graph of a torch cannot be read, as the end of a sentence; None if it can.

    Args:
        version: that of torch.
        examples: a node of each type that `FIELDS` has, made by this torch.
    """
    fields = TABLE.get(".".join(version.split(".")[:2]))
    if fields is None:
        return f"the private fields of autograd's nodes are not known for torch {version}"
    for kind, wanted in fields.items():
        if kind not in examples:
            return f"torch {version} makes no {kind}"
        missing = sorted(field for field in wanted | OF_EVERY_NODE if not hasattr(examples[kind], field))
        if missing:
            return f"{kind} of torch {version} has no {', '.join(missing)}"
    return None


def _examples() -> dict[str, Any]:
    """A node of each type, from operations of the installed torch."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        w = torch.zeros(2, 2, requires_grad=True)
        results = [
            torch.addmm(w, w, w),
            torch.mm(w, w),
            torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), w),
            w.t(),
            w.to(torch.float64 if w.dtype != torch.float64 else torch.float32),
            w.transpose(0, 1),
            w.permute(1, 0),
        ]
    return {type(result.grad_fn).__name__: result.grad_fn for result in results}


_WHY = unreadable(torch.__version__, _examples())


def why_unreadable() -> str | None:
    """Why no parameter can take the implicit way here, as the end of a sentence; None if some may."""
    if _native.module() is None:
        return "the compiled extension is needed to see hooks"
    return _WHY
