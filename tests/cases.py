"""The grids that op tests run over: devices, dtypes, shapes, layouts, numbers of tasks, missing gradients."""

import pytest
import torch
from torch import Tensor

from mtlfast import TaskGradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TASKS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16]

# Around the borders of vectors (4 to 64 elements), gathered pieces (128, 256), blocks (256, 512) and chunks (8192).
SHAPES = {
    "no tensors": [],
    "one": [(1000,)],
    "scalar": [()],
    "empty": [(0,), (3, 0)],
    "mixed": [(3, 4), (0,), (7,), (), (2, 0, 5), (130,), (64, 9), (1,)],
    "borders": [
        (n,) for n in (1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025)
    ],
    "chunks": [(8191,), (1,), (8192,), (8193,), (70_001,)],
    "600 tensors": [(1 + i % 5,) for i in range(600)],
}

LAYOUTS = ["contiguous", "channels_last", "transposed", "misaligned"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, if they have enough dimensions."""
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "misaligned":
        room = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return room[1:].view(values.shape).copy_(values)
    return values


def draw_rows(
    num_tasks: int,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    missing: float = 0.0,
    device: str = "cpu",
) -> list[list[Tensor | None]]:
    """Rows of random normal gradients, of which a share `missing` is None."""
    return [
        [
            None if torch.rand(()) < missing else laid_out(torch.randn(shape).to(dtype).to(device), layout)
            for shape in shapes
        ]
        for _ in range(num_tasks)
    ]


def draw(*args, **kwargs) -> TaskGradients:
    """`draw_rows` as TaskGradients."""
    return TaskGradients.from_rows(draw_rows(*args, **kwargs))


def wide(grads: TaskGradients) -> TaskGradients:
    """The same numbers in float64, on the CPU."""
    return TaskGradients.from_rows([[None if g is None else g.cpu().double() for g in row] for row in grads.rows])


def matrix(grads: TaskGradients) -> Tensor:
    """The Jacobian [K, P] in float64 on the CPU, entry by entry."""
    zeros = [None if shape is None else torch.zeros(shape, dtype=torch.float64) for shape in grads.shapes]
    rows = [
        [z if g is None else g.detach().cpu().double() for g, z in zip(row, zeros, strict=True) if z is not None]
        for row in grads.rows
    ]
    return torch.stack(
        [torch.cat([torch.zeros(0, dtype=torch.float64), *(g.reshape(-1) for g in row)]) for row in rows]
    )
