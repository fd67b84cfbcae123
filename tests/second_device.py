"""A second device for a host without one: tensors in host memory that mix with no CPU tensor, as on a real device.

Run as a script it checks steps whose shared parameters are on both devices. Registering a device changes the whole
process, so that this is a process of its own.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from elementwise import METHODS as ELEMENT_WISE
from torch import Tensor, nn
from torch.utils import _pytree, backend_registration
from unusual import METHODS, check_step

import mtlfast
from mtlfast import _grad
from mtlfast._arguments import shared_parameters
from mtlfast._losses import present_losses
from mtlfast.aggregation import MGDA, PCGrad, Sum
from mtlfast.jacobian import StoredJacobian
from mtlfast.weighting import UW

aten = torch.ops.aten
MIXING = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default)  # as on a GPU


class Other(Tensor):
    """A tensor on the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Other":
        made: Other = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device("other:0")
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Other({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func not in MIXING:
            for given in _pytree.tree_leaves((args, kwargs)):
                if isinstance(given, Tensor) and not isinstance(given, Other) and given.dim():
                    raise RuntimeError(f"{func}: expected all tensors on one device")
        args, kwargs = _pytree.tree_map_only(Other, lambda x: x.held, (args, kwargs or {}))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        if device is not None and torch.device(device).type != "other":
            return result
        return _pytree.tree_map_only(Tensor, Other, result)


def register() -> None:
    """Makes "other" a device."""
    backend_registration._setup_privateuseone_for_python_backend("other")
    makers = {
        "empty.memory_format": torch.empty,
        "empty_strided": torch.empty_strided,
        "eye": torch.eye,
        "eye.m": torch.eye,
        "arange": torch.arange,
        "arange.start": torch.arange,
        "arange.start_step": torch.arange,
    }
    for name, make in makers.items():
        torch.library.impl(f"aten::{name}", "PrivateUse1")(partial(_made, make))


def _made(make: Callable[..., Tensor], *sizes: Any, dtype: torch.dtype | None = None, **_: Any) -> Other:
    return Other(make(*sizes, dtype=dtype))


def parameter(size: int, device: str, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    made = torch.randn(size, dtype=dtype)
    return nn.Parameter(Other(made) if device == "other" else made)


def losses_of(shared: list[nn.Parameter], num_tasks: int, device: str = "cpu") -> list[Tensor]:
    """Losses on `device`. Not every task reaches every parameter."""
    losses = []
    for k in range(num_tasks):
        parts = [
            ((p - k).square() * (k + 1) ** t).mean() for t, p in enumerate(shared) if k == 0 or (k + t) % len(shared)
        ]
        losses.append(sum(part.to(device) for part in parts))
    return losses


def check_steps() -> None:
    """Every method on parameters of two devices, whichever is the first, wherever the losses are."""
    for devices in (("cpu", "other", "cpu"), ("other", "cpu", "other")):
        for num_tasks in (1, 2, 3, 8):
            for name in METHODS:
                shared = [parameter(3 + t, device) for t, device in enumerate(devices)]
                for device in ("cpu", "other"):
                    losses = losses_of(shared, num_tasks, device)
                    result = check_step(METHODS[name], losses, shared, 1e-9, diagnostics=True)
                    assert {x.device for x in (result.gram, result.weights, result.losses)} == {shared[0].device}
                    assert [p.grad.device for p in shared] == [p.device for p in shared]


def check_stored_dtype() -> None:
    shared = [parameter(5, "cpu", torch.float32), parameter(4, "other")]
    check_step(METHODS["PCGrad"], losses_of(shared, 3), shared, 2e-2, storage_dtype=torch.bfloat16)


def check_norms() -> None:
    shared = [parameter(3, "cpu"), parameter(4, "other")]
    assert check_step(METHODS["NormBalance"], losses_of(shared, 3), shared, 1e-9).gram is None


def check_weighting() -> None:
    """Loss weights and the gradients of a parameter that is not shared come to the devices where they are needed."""
    weights = []
    for first, second, third in (("cpu", "cpu", "cpu"), ("cpu", "other", "other"), ("other", "cpu", "cpu")):
        torch.manual_seed(0)
        shared, own, weighting = [parameter(3, first), parameter(4, second)], parameter(2, third), UW(3)
        losses = [loss + own.sum().to("cpu") for loss in losses_of(shared, 3)]
        losses[1] = losses[1].to(second)
        weighting.to(first)
        weights.append(mtlfast.backward(losses, Sum(), shared=shared, weighting=weighting).loss_weights)
        assert weights[-1].device == shared[0].device
        assert torch.allclose(own.grad.cpu(), weights[0].sum().to(own.dtype).expand(2))
    assert all(torch.equal(of_devices.cpu(), weights[0]) for of_devices in weights)


def check_late_loss_weights() -> None:
    """Loss weights that `write` gets multiply plain gradients on either device."""
    shared, own, late = [parameter(3, "other"), parameter(4, "cpu")], parameter(2, "cpu"), torch.tensor([0.5, 3.0])
    losses = [loss + own.sum() for loss in losses_of(shared, 2)]
    jacobian = StoredJacobian(present_losses(losses), shared_parameters(shared), loss_weights_later=True)
    jacobian.obtain()
    jacobian.write(torch.ones(2, dtype=torch.float64), late.to(shared[0].device))
    assert own.grad.tolist() == [3.5, 3.5]


def check_refusals() -> None:
    """Element-wise methods say why they have no rows, and what fails in the middle leaves every `.grad` as it was."""
    shared = [parameter(3, "cpu"), parameter(4, "other")]
    with pytest.raises(TypeError, match="but the shared parameters are on cpu and other:0, expected one device"):
        mtlfast.backward(losses_of(shared, 2), ELEMENT_WISE["Median"].make(), shared=shared)

    class Fails(MGDA):
        def solve(self, *arguments: Any) -> Tensor:
            raise RuntimeError("in the middle")

    mtlfast.backward(losses_of(shared, 2), PCGrad(), shared=shared)
    before = [p.grad.clone() for p in shared]
    real, calls = _grad.weighted, []

    def fails_for_the_second_part(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*arguments)

    for aggregator, weighted in ((Fails(), real), (PCGrad(), fails_for_the_second_part)):
        _grad.weighted = weighted
        with pytest.raises(RuntimeError, match=r"in the middle|out of memory"):
            mtlfast.backward(losses_of(shared, 2), aggregator, shared=shared)
        assert all(torch.equal(p.grad.cpu(), b.cpu()) for p, b in zip(shared, before, strict=True))
    assert len(calls) == 2


CHECKS = (check_steps, check_norms, check_stored_dtype, check_weighting, check_late_loss_weights, check_refusals)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    register()
    torch.manual_seed(0)
    for check in CHECKS:
        check()
    print(f"{len(CHECKS)} checks passed")
