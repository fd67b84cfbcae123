"""K tasks as mixtures of the losses of S samples: L_k = sum_s A[k, s] l_s."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The mixing matrix A [K, S], dense, or by the task of each sample where no sample belongs to two tasks.

    Attributes:
        num_tasks: K.
        matrix: [K, S] float64; None if `task` is given.
        task: [S] int64, each sample's task, or K for a sample of none; None if `matrix` is given.
        factors: [K] float64, what each task's row is multiplied by.
        sizes: beside `task`, the numbers of samples of the K tasks and of none, which the host knows.
    """

    num_tasks: int
    matrix: Tensor | None
    task: Tensor | None
    factors: Tensor
    sizes: tuple[int, ...] | None = None

    @property
    def number(self) -> int:
        """S."""
        given = self.task if self.matrix is None else self.matrix
        assert given is not None
        return given.shape[-1]

    def scaled(self, factors: Tensor) -> Samples:
        """The same with each task's row multiplied by a factor [K]."""
        return replace(self, factors=self.factors * factors.double().to(self.factors.device))

    def losses(self, per_sample: Tensor) -> Tensor:
        """[K] the tasks' losses."""
        if self.task is not None:
            return per_sample.new_zeros(self.num_tasks + 1).index_add(0, self.task, per_sample)[:-1]
        assert self.matrix is not None
        return self.matrix.to(per_sample.dtype) @ per_sample

    def gram(self, of_samples: Tensor) -> Tensor:
        """A G A^T [..., K, K] for Gram matrices [..., S, S] float64 of the samples' gradients."""
        if self.task is None:
            assert self.matrix is not None
            scaled = self.factors.unsqueeze(1) * self.matrix
            return scaled @ of_samples @ scaled.mT
        shape = of_samples.shape[:-2]
        rows = of_samples.new_zeros(*shape, self.num_tasks + 1, self.number).index_add(-2, self.task, of_samples)
        both = rows.new_zeros(*shape, self.num_tasks + 1, self.num_tasks + 1).index_add(-1, self.task, rows)
        return both[..., :-1, :-1] * self.factors.outer(self.factors)

    def gram_of_diagonal(self, diagonal: Tensor) -> Tensor:
        """A diag(d) A^T [..., K, K] for d [..., S] float64."""
        if self.task is None:
            assert self.matrix is not None
            scaled = self.factors.unsqueeze(1) * self.matrix
            return (scaled * diagonal.unsqueeze(-2)) @ scaled.mT
        shape = diagonal.shape[:-1]
        sums = diagonal.new_zeros(*shape, self.num_tasks + 1).index_add(-1, self.task, diagonal)[..., :-1]
        return torch.diag_embed(sums * self.factors.square())

    def shared_out(self, of_tasks: Tensor) -> Tensor:
        """[S] each sample's equal share in what its task has, for [K]; 0 for a sample of none."""
        assert self.task is not None
        assert self.sizes is not None
        sizes = torch.tensor(self.sizes[:-1], dtype=of_tasks.dtype).to(of_tasks.device, non_blocking=True)
        return torch.nn.functional.pad(of_tasks / sizes.clamp(min=1), (0, 1))[self.task]

    def mixed(self, of_samples: Tensor) -> Tensor:
        """[K, p] float64 the rows of tasks, for rows [S, p] of samples."""
        rows = of_samples.double()
        if self.task is None:
            assert self.matrix is not None
            return (self.factors.unsqueeze(1) * self.matrix) @ rows
        sums = rows.new_zeros(self.num_tasks + 1, rows.shape[1]).index_add(0, self.task, rows)[:-1]
        return sums * self.factors.unsqueeze(1)

    def weights(self, weights: Tensor) -> Tensor:
        """w^T A, [S] or [G, S], for weights [K] or [G, K] of the tasks."""
        scaled = weights.double().to(self.factors.device) * self.factors
        if self.task is None:
            assert self.matrix is not None
            return scaled @ self.matrix
        return torch.nn.functional.pad(scaled, (0, 1))[..., self.task]


def samples_of(mixing: object, per_sample: object) -> tuple[Tensor, Samples]:
    """The losses of the samples and the mixing of K tasks, from the arguments of `mtlfast.backward`.

    Raises:
        ValueError, TypeError: `per_sample` is no vector of losses, or `mixing` does not fit it.
    """
    if not isinstance(per_sample, Tensor):
        raise TypeError(f"backward: losses is a {type(per_sample).__name__}, expected a Tensor [S] beside mixing=")
    if per_sample.dim() != 1 or len(per_sample) == 0:
        raise ValueError(f"backward: losses has shape {list(per_sample.shape)}, expected [S] beside mixing=")
    if not per_sample.requires_grad or not per_sample.is_floating_point():
        raise ValueError("backward: losses does not require grad, expected losses [S] that depend on parameters")
    S = len(per_sample)
    if not isinstance(mixing, Tensor):
        raise TypeError(f"backward: mixing is a {type(mixing).__name__}, expected a Tensor [K, S] or [S] of integers")
    device = per_sample.device
    if mixing.requires_grad:
        raise ValueError("backward: mixing requires grad, expected mixing.detach(), because A gets no gradient")
    if mixing.layout != torch.strided:
        raise TypeError(
            f"backward: mixing has layout {mixing.layout}, expected a dense Tensor, as mixing.to_dense() is"
        )
    whole = not (mixing.is_floating_point() or mixing.is_complex() or mixing.dtype == torch.bool)
    if mixing.dim() == 2:
        if mixing.shape[1] != S or len(mixing) == 0 or mixing.is_complex():
            turned = ", such as mixing.T" if len(mixing) == S and not mixing.is_complex() else ""
            if whole and mixing.shape == (S, 1):
                turned = f", or [{S}] integers, such as mixing.squeeze(1)"
            got = f"{list(mixing.shape)} {mixing.dtype}"
            raise ValueError(f"backward: mixing is {got}, expected a real [K, {S}] for {S} losses{turned}")
        matrix = mixing.detach().to(device, torch.float64)
        return per_sample, Samples(len(mixing), matrix, None, matrix.new_ones(len(mixing)))
    if mixing.dim() != 1 or len(mixing) != S or not whole:
        raise ValueError(
            f"backward: mixing is {list(mixing.shape)} {mixing.dtype}, expected [K, {S}], or [{S}] integers, each "
            "sample's task"
        )
    if mixing.device.type != "cpu":
        raise ValueError("backward: mixing is on a GPU, expected the tasks of samples on the CPU, or a matrix [K, S]")
    task = mixing.detach().long()
    least, most = int(task.min()), int(task.max())  # host: a CPU tensor
    if least < -1:
        raise ValueError(f"backward: mixing has {least}, expected tasks from 0 on, or -1 for a sample of no task")
    if most < 0:
        raise ValueError("backward: mixing has -1 for every sample, expected at least one sample of a task")
    task = torch.where(task < 0, most + 1, task)
    sizes = tuple(task.bincount(minlength=most + 2).tolist())  # host: a CPU tensor
    ones = torch.ones(most + 1, dtype=torch.float64, device=device)
    return per_sample, Samples(most + 1, None, task.to(device), ones, sizes)
