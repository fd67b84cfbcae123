"""Loss weightings beside an installed torchjd.scalarization and LibMTL: the same loss and gradient, 200 times each."""

import importlib
import importlib.util
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mtlfast
from mtlfast import weighting
from mtlfast.aggregation import Sum
from mtlfast.weighting import LossWeighting

MATRICES = 200
WEIGHTS, REFERENCE = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.05, 0.01, 0.02])


def losses(step: int) -> Tensor:
    torch.manual_seed(step)
    return torch.rand(3) * torch.tensor([1.0, 10.0, 0.1]) + 0.1


def loss_and_gradient(made: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone().requires_grad_()
    torch.manual_seed(0)
    loss = made(values)
    return loss.detach(), torch.autograd.grad(loss, values)[0]


# name -> arguments of both, which are the same
PAIRS = {
    "Constant": ((WEIGHTS,), {}),
    "Mean": ((), {}),
    "Sum": ((), {}),
    "Random": ((), {}),
    "GeometricMean": ((), {}),
    "IMTLL": ((3,), {}),
    "UW": ((3,), {}),
    "FAMO": ((3,), {}),
    "FAMO, bounds": ((3,), {"min_losses": REFERENCE, "lr": 0.1, "weight_decay": 0.01}),
    "STCH": ((0.5,), {}),
    "STCH, preferring": ((0.05, WEIGHTS, REFERENCE), {}),
    "PBI": ((5.0, WEIGHTS), {}),
    "PBI, reference": ((1.0, WEIGHTS, REFERENCE), {}),
    "COSMOS": ((2.0, WEIGHTS), {}),
    "DWA": ((), {"temperature": 0.7}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_torchjd(name):
    torchjd = pytest.importorskip("torchjd.scalarization", reason="needs the optional group peers")
    arguments, settings = PAIRS[name]
    method = name.split(",")[0]
    ours: LossWeighting = getattr(weighting, method)(*((3,) if method == "DWA" else ()), *arguments, **settings)
    theirs = getattr(torchjd, method)(*arguments, **settings)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=False))
    for step in range(MATRICES):
        if method in ("UW", "IMTLL"):
            for one, other in pairs:
                one.data = other.data = torch.randn(3)
        mine, yours = loss_and_gradient(ours, losses(step)), loss_and_gradient(theirs, losses(step))
        for one, other in zip(mine, yours, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), step
        if method == "FAMO":
            ours.update(losses=losses(step + 1000))
            theirs.update(losses(step + 1000))
            assert torch.allclose(ours.logits.float(), theirs._w, rtol=1e-3, atol=1e-5)
        if method == "DWA" and step % 7 == 6:
            ours.update()
            theirs.step()


# name -> how ours is made
LIBMTL: dict[str, Callable[[], LossWeighting]] = {
    "EW": weighting.Sum,
    "GLS": weighting.GeometricMean,
    "RLW": weighting.Random,
    "UW": lambda: weighting.UW(3),
    "DWA": lambda: weighting.DWA(3, temperature=0.7),
}


def libmtl(name: str):
    """LibMTL's weighting of three tasks, without its trainer and data sets, which want torchvision."""
    spec = importlib.util.find_spec("LibMTL")
    if spec is None:
        pytest.skip("needs LibMTL, which `make` installs")
    sys.modules.setdefault("LibMTL", importlib.util.module_from_spec(spec))
    made = getattr(importlib.import_module("LibMTL.weighting"), name)()
    made.task_num, made.device, made.epoch = 3, "cpu", 0
    made.init_param()
    return made


@pytest.mark.parametrize("name", LIBMTL)
def test_libmtl(name):
    ours, theirs = LIBMTL[name](), libmtl(name)
    if name == "UW":
        ours.log_var.data = theirs.loss_scale.detach().clone()
    means: list[Tensor] = []
    for epoch in range(MATRICES // 20):
        theirs.epoch = epoch
        if means:
            theirs.train_loss_buffer = torch.stack(means, dim=1).numpy()
        for step in range(20):
            values = losses(20 * epoch + step)
            _, mine = loss_and_gradient(ours, values)
            torch.manual_seed(0)
            yours = values.clone().requires_grad_()
            theirs.backward(yours, T=0.7, dist="Normal")
            assert torch.allclose(mine, yours.grad, rtol=1e-4, atol=1e-6), (epoch, step)
        means.append(torch.stack([losses(20 * epoch + step) for step in range(20)]).mean(dim=0))
        ours.update()


class Shared(torch.nn.Module):
    """Parameters that three tasks share, with losses of different size and no heads: LibMTL does not weigh these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def losses(self, step: int) -> Tensor:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        errors = self.last(self.hidden(x).tanh()) - torch.tensor([1.0, 3.0, 0.5]) * x[:, :3].sin()
        return errors.square().mean(dim=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gradnorm_of_libmtl(optimizer):
    theirs, kind = libmtl("GradNorm"), {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    models = mine, yours = Shared(), Shared()
    descents = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    of_weights = kind([theirs.loss_scale], lr=0.05)
    theirs.epoch, theirs.rep_grad = 1, False  # it takes the mean losses of epoch 0 as initial ones
    theirs.train_loss_buffer = yours.losses(MATRICES).detach()[:, None].numpy()
    theirs.get_share_params = yours.parameters
    theirs.zero_grad_share_params = lambda: yours.zero_grad(set_to_none=False)
    initial = mine.losses(MATRICES).detach()
    ours = weighting.GradNorm(3, 1.5, 0.05, optimizer, "softmax", initial_losses=initial)
    for step in range(MATRICES):
        for descent in (*descents, of_weights):
            descent.zero_grad(set_to_none=False)
        expected = theirs.backward(yours.losses(step), alpha=1.5)
        result = mtlfast.backward(list(mine.losses(step)), Sum(), shared=mine, weighting=ours)
        assert torch.allclose(result.loss_weights, torch.from_numpy(expected), rtol=1e-4), step
        for one, other in zip(mine.parameters(), yours.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)
        for descent in (*descents, of_weights):
            descent.step()
    assert max(expected) > 1.3 * min(expected)
