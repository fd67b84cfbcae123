"""Arguments that do not fit mixtures of samples: one sentence each."""

import pytest
import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Median, UPGrad

pytestmark = pytest.mark.native


def backward(per_sample: object = None, A: object = None, **more) -> mtlfast.StepResult:
    w = nn.Linear(3, 1)
    per_sample = w(torch.ones(4, 3)).squeeze(1) if per_sample is None else per_sample
    shared = more.pop("shared", w)
    return mtlfast.backward(per_sample, UPGrad(), shared=shared, mixing=torch.ones(2, 4) if A is None else A, **more)


def losses_of(*shape: int, **how) -> Tensor:
    return torch.ones(shape, requires_grad=True, **how) * 1


BAD = {
    "requires grad": (
        lambda: backward(A=torch.ones(2, 4, requires_grad=True)),
        ValueError,
        "mixing requires grad, expected mixing.detach(), because A gets no gradient",
    ),
    "a column of integers": (
        lambda: backward(A=torch.zeros(4, 1, dtype=torch.long)),
        ValueError,
        "for 4 losses, or [4] integers, such as mixing.squeeze(1)",
    ),
    "a list of losses": (lambda: backward([losses_of()]), TypeError, "losses is a list, expected a Tensor [S]"),
    "closures": (lambda: backward([lambda: losses_of()]), TypeError, "losses is a list, expected a Tensor [S]"),
    "a dict": (lambda: backward({"a": losses_of()}), TypeError, "losses is a dict, expected a Tensor [S]"),
    "an accumulator": (
        lambda: backward(mtlfast.TaskGradientAccumulator()),
        TypeError,
        "losses is a TaskGradientAccumulator, expected a Tensor [S]",
    ),
    "a matrix of losses": (lambda: backward(losses_of(4, 1)), ValueError, "losses has shape [4, 1], expected [S]"),
    "a scalar": (lambda: backward(losses_of()), ValueError, "losses has shape [], expected [S]"),
    "no samples": (lambda: backward(losses_of(0)), ValueError, "losses has shape [0], expected [S]"),
    "constants": (lambda: backward(torch.ones(4)), ValueError, "losses does not require grad"),
    "complex": (lambda: backward(losses_of(4, dtype=torch.cfloat)), ValueError, "losses"),
    "no tensor": (lambda: backward(A=[[1.0] * 4]), TypeError, "mixing is a list, expected a Tensor [K, S] or [S]"),
    "too few samples": (lambda: backward(A=torch.ones(2, 3)), ValueError, "mixing is [2, 3] torch.float32, expected"),
    "turned": (lambda: backward(A=torch.ones(4, 2)), ValueError, "mixing is [4, 2] torch.float32, expected"),
    "no tasks": (lambda: backward(A=torch.ones(0, 4)), ValueError, "mixing is [0, 4] torch.float32, expected"),
    "complex weights": (lambda: backward(A=torch.ones(2, 4) * 1j), ValueError, "mixing is [2, 4] torch.complex64"),
    "too many dimensions": (lambda: backward(A=torch.ones(2, 4, 1)), ValueError, "mixing is [2, 4, 1]"),
    "fractions of tasks": (lambda: backward(A=torch.ones(4)), ValueError, "mixing is [4] torch.float32, expected"),
    "bools for tasks": (lambda: backward(A=torch.ones(4, dtype=torch.bool)), ValueError, "mixing is [4] torch.bool"),
    "too few tasks": (lambda: backward(A=torch.zeros(3).long()), ValueError, "mixing is [3] torch.int64, expected"),
    "below -1": (lambda: backward(A=torch.tensor([0, 1, -2, 0])), ValueError, "mixing has -2, expected tasks from 0"),
    "all of no task": (lambda: backward(A=torch.full((4,), -1)), ValueError, "mixing has -1 for every sample"),
    "features": (lambda: backward(features=[losses_of(4)], shared=None), ValueError, "features"),
    "at": (lambda: backward(at=[losses_of(4)], shared=None), ValueError, "at"),
    "second": (lambda: backward(second=[losses_of()]), ValueError, "second"),
    "no mixing": (
        lambda: mtlfast.backward([losses_of()], UPGrad(), jacobian="mixing"),
        ValueError,
        'jacobian is "mixing", expected mixing= beside it',
    ),
    "a storage dtype": (
        lambda: backward(jacobian="mixing", storage_dtype=torch.bfloat16),
        ValueError,
        "storage_dtype",
    ),
    "an unknown way": (lambda: backward(jacobian="only"), ValueError, "jacobian is 'only', expected"),
    "an element-wise method": (
        lambda: mtlfast.backward(
            (w := nn.Linear(3, 1))(torch.ones(4, 3)).squeeze(1),
            Median(),
            shared=w,
            mixing=torch.ones(2, 4),
            jacobian="mixing",
        ),
        (ValueError, TypeError),
        'expected jacobian="stored"',
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, kind, expected = BAD[name]
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert expected in message, message
    assert ". " not in message
    assert "\n" not in message


def test_an_element_wise_method_stores_the_gradients():
    w = nn.Linear(3, 1)
    made = mtlfast.backward(w(torch.ones(4, 3)).squeeze(1), Median(), shared=w, mixing=torch.ones(2, 4))
    assert made.plan.way == "stored"


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("way", ["auto", "mixing", "stored"])
@pytest.mark.parametrize("tasks", [1, 6])
def test_shared_may_be_a_generator(tasks, way):
    w = nn.Linear(3, 1)
    losses = w(torch.ones(4, 3)).squeeze(1)
    made = mtlfast.backward(losses, UPGrad(), shared=w.parameters(), mixing=torch.ones(tasks, 4), jacobian=way)
    assert made.plan.way == ("stored" if tasks == 1 and way == "auto" else "mixing" if way == "auto" else way)
    assert len(made.plan.layers) == (0 if way == "stored" else 2)
