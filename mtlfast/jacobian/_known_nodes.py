"""The nodes of the autograd graph whose private fields are read, and whether this torch has them."""

from __future__ import annotations

from typing import Any

import torch

from mtlfast import _native


def _fields(saved: str, tensors: str = "") -> frozenset[str]:
    """The fields that a node has for what it saves: numbers, and tensors, which hooks may have packed."""
    names = [f"_saved_{name}" for name in (saved + " " + tensors).split()]
    return frozenset(names + [f"_raw_saved_{name}" for name in tensors.split()])


# For each type of node the fields that are read. Their names are not public, so that each version of torch is listed.
FIELDS: dict[str, frozenset[str]] = {
    "AddmmBackward0": _fields("alpha beta", "mat1 mat2"),
    "MmBackward0": _fields("", "self mat2"),
    "EmbeddingBackward0": _fields("padding_idx scale_grad_by_freq sparse", "indices"),
    "TBackward0": _fields(""),
    "ToCopyBackward0": _fields(""),
    "TransposeBackward0": _fields("dim0 dim1"),
    "PermuteBackward0": _fields("dims"),
    # What mixtures of samples read besides.
    "AddBackward0": _fields("alpha"),
    "MulBackward0": _fields("", "self other"),
    "NativeLayerNormBackward0": _fields("", "input result1 result2"),
    "NativeGroupNormBackward0": _fields("N group", "input result1 result2"),
    "NativeBatchNormBackward0": _fields("training eps", "input running_mean running_var"),
    "ConvolutionBackward0": _fields("stride padding dilation transposed output_padding groups", "input"),
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
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):  # computes nothing
        w = torch.zeros(2, 2, requires_grad=True)
        results = [
            torch.addmm(w, w, w),
            torch.mm(w, w),
            torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), w),
            w.t(),
            w.to(torch.float64 if w.dtype != torch.float64 else torch.float32),
            w.transpose(0, 1),
            w.permute(1, 0),
            w + w,
            w * w,
            torch.nn.functional.layer_norm(w, [2], w[0]),
            torch.nn.functional.group_norm(w, 1, w[0]),
            torch.nn.functional.batch_norm(w, w.detach()[0], w.detach()[0], w[0]),
            torch.nn.functional.conv1d(w.unsqueeze(0), w.unsqueeze(2)),
        ]
    return {type(result.grad_fn).__name__: result.grad_fn for result in results}


_WHY = unreadable(torch.__version__, _examples())


def why_unreadable() -> str | None:
    """Why no parameter can take the implicit way here, as the end of a sentence; None if some may."""
    if _native.module() is None:
        return "the compiled extension is needed to see hooks"
    return _WHY
