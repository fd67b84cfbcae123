"""What the benchmark runs on: task gradients scattered over many tensors of mixed sizes, as a network has them."""

import torch
from torch import Tensor

from mtlfast.task_gradients import TaskGradients


def tensor_sizes(elements: int, num_tensors: int = 150, seed: int = 0) -> list[int]:
    """Sizes of `num_tensors` tensors, `elements` in all, from biases of a few hundred to matrices of a million.

    Args:
        elements: P, their sum.
        num_tensors: T.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(num_tensors, generator=generator, dtype=torch.float64).pow(4) + 1e-5
    sizes = (shares / shares.sum() * elements).long().clamp(min=1)
    sizes[sizes.argmax()] += elements - sizes.sum()
    return [int(size) for size in sizes]


def scattered(
    num_tasks: int,
    elements: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    num_tensors: int = 150,
) -> TaskGradients:
    """K tasks x `num_tensors` separately allocated tensors of random normal numbers.

    Args:
        num_tasks: K.
        elements: P, elements of one task's gradient.
        dtype: of the gradients.
        device: where they lie.
        num_tensors: T.
    """
    generator = torch.Generator(device).manual_seed(1)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    sizes = tensor_sizes(elements, num_tensors)
    return TaskGradients.from_rows([[draw(size) for size in sizes] for _ in range(num_tasks)])
