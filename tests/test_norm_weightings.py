"""The loss weightings that follow the norms of the task gradients, alone and in `mtlfast.backward`."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import InverseNorm, PCGrad, Sum
from mtlfast.weighting import AdaptiveWeight, GradNorm, InverseNormLoss, LRAnnealing

K = 3
MAKES = {
    "GradNorm": lambda **kw: GradNorm(K, **kw),
    "GradNorm, log": lambda **kw: GradNorm(K, form="log", optimizer="sgd", **kw),
    "InverseNormLoss": lambda **kw: InverseNormLoss(K, **kw),
    "InverseNormLoss, last": lambda **kw: InverseNormLoss(K, decay=0.0, **kw),
    "LRAnnealing": lambda **kw: LRAnnealing(K, reference=1, decay=0.5, **kw),
    "AdaptiveWeight": lambda **kw: AdaptiveWeight(K, **kw),
}
every_method = pytest.mark.parametrize("name", MAKES)


class Net(nn.Module):
    """A trunk of two layers and a head for each task, in float64; the targets differ in size by factors of three."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(K))
        self.to(device, torch.float64)

    @property
    def last(self) -> Tensor:
        return self.trunk[2].weight

    def losses(self, step: int) -> list[Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(self.last)
        features = self.trunk(x)
        return [
            (head(features) - 3.0**k * x.sin().sum(dim=1, keepdim=True)).square().mean()
            for k, head in enumerate(self.heads)
        ]

    def descend(self) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p -= 1e-3 * p.grad
                p.grad = None


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7)) for a, b in pairs)


def gradnorm_by_autograd(net: Net, steps: int, alpha: float, form: str, optimizer: torch.optim.Optimizer, mean: bool):
    """The weights of each step, by the paper's loss of the weights, differentiated with a second graph.

    `mean` is for the mean over the tasks in place of the sum.
    """
    ((learned,),) = (group["params"] for group in optimizer.param_groups)
    first, history = None, []
    for step in range(steps):
        losses = net.losses(step)
        first = torch.stack(losses).detach() if first is None else first
        weights = {"linear": learned, "log": learned.exp(), "softmax": K * learned.softmax(dim=0)}[form]
        history.append(weights.detach().clone())
        norms = torch.stack(
            [
                torch.autograd.grad(w * loss, net.last, create_graph=True, retain_graph=True)[0].norm()
                for w, loss in zip(weights, losses, strict=True)
            ]
        )
        rates = torch.stack(losses).detach() / first
        targets = norms.mean().detach() * (rates / rates.mean()) ** alpha
        distances = (norms - targets).abs()
        (slope,) = torch.autograd.grad(distances.mean() if mean else distances.sum(), learned, retain_graph=True)
        sum(w * loss for w, loss in zip(weights.detach(), losses, strict=True)).backward()
        net.descend()
        learned.grad = slope
        optimizer.step()
        with torch.no_grad():
            if form == "linear":
                learned *= K / learned.abs().sum()
            elif form == "log":
                learned += torch.log(K / learned.exp().sum())
    return history


def gradnorm(net: Net, made: GradNorm, steps: int) -> list[Tensor]:
    history = []
    for step in range(steps):
        result = mtlfast.backward(net.losses(step), Sum(), shared=net.trunk, weighting=made)
        history.append(result.loss_weights)
        net.descend()
    return history


@pytest.mark.parametrize("form", ["linear", "log", "softmax"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_is_that_of_its_paper(form, optimizer, alpha, device):
    learned = torch.nn.Parameter(torch.full((K,), float(form == "linear"), dtype=torch.float64, device=device))
    kind, lr = (torch.optim.SGD, 1e-3) if optimizer == "sgd" else (torch.optim.Adam, 0.025)
    expected = gradnorm_by_autograd(Net(device), 30, alpha, form, kind([learned], lr=lr), mean=False)
    net = Net(device)
    made = GradNorm(K, alpha, lr, optimizer, form, layers=net.last).to(device)
    for mine, wanted in zip(gradnorm(net, made, 30), expected, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-9)
    assert not torch.allclose(expected[-1], expected[0], rtol=0.05)


def test_gradnorm_as_in_gradnorm_pytorch(device):
    # The mean of the distances divides its learning rate by K; its defaults are alpha 0 and 1e-4.
    weights = torch.nn.Parameter(torch.ones(K, dtype=torch.float64, device=device))
    optimizer = torch.optim.SGD([weights], lr=1e-4)
    expected = gradnorm_by_autograd(Net(device), 30, 0.0, "linear", optimizer, mean=True)
    net = Net(device)
    made = GradNorm(K, alpha=0.0, lr=1e-4 / K, optimizer="sgd", layers=[net.last]).to(device)
    for mine, wanted in zip(gradnorm(net, made, 30), expected, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-9)
    assert not torch.equal(expected[-1], expected[0])


def test_an_adaptive_weight_is_that_of_vqgan(device):
    net = Net(device)
    made = AdaptiveWeight(K, factor=0.8, start=2, layers=net.last).to(device)
    for step in range(4):
        losses = net.losses(step)
        aim, own, _ = (torch.autograd.grad(loss, net.last, retain_graph=True)[0].norm() for loss in losses)
        weight = (aim / (own + 1e-4 * aim)).clamp(0, 1e4) * 0.8 * (step >= 2)
        wanted = torch.autograd.grad(losses[0] + weight * losses[1] + losses[2], list(net.parameters()))
        result = mtlfast.backward(net.losses(step), Sum(), shared=net.trunk, weighting=made)
        assert torch.allclose(result.loss_weights, torch.stack([torch.ones_like(weight), weight, torch.ones_like(aim)]))
        for p, gradient in zip(net.parameters(), wanted, strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # the head of a task at weight 0
            assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-12)
        net.descend()


def test_lr_annealing_by_mean_absolute_values(device):
    net = Net(device)
    made, weights = LRAnnealing(K, decay=0.9).to(device), torch.ones(K, dtype=torch.float64, device=device)
    for step in range(4):
        losses = net.losses(step)
        rows = [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in losses]
        means = torch.stack([torch.cat([g.flatten() for g in row]).abs().mean() for row in rows])
        weights = 0.9 * weights + 0.1 * means[0] / means
        result = mtlfast.backward(losses, Sum(), shared=net.trunk, weighting=made)
        assert torch.allclose(result.loss_weights, weights, rtol=1e-9)
        net.descend()


def test_inverse_norms_before_the_sum_are_the_aggregator(device):
    grads = []
    for aggregator, given in ((InverseNorm(), None), (Sum(), InverseNormLoss(K, decay=0.0).to(device))):
        net = Net(device)
        mtlfast.backward(net.losses(0), aggregator, shared=net.trunk, weighting=given)
        grads.append(torch.cat([p.grad.flatten() for p in net.trunk.parameters()]))
    assert torch.allclose(grads[0] / grads[0].norm(), grads[1] / grads[1].norm())


@every_method
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_heads_see_the_weights_and_the_loss_scale_does_not(name, scale, device):
    net, other = Net(device), Net(device)
    made, twin = MAKES[name](layers=net.last).to(device), MAKES[name](layers=other.last).to(device)
    for step in range(3):
        losses = [scale * loss for loss in net.losses(step)]
        result = mtlfast.backward(losses, PCGrad(), shared=net.trunk, weighting=made, loss_scale=scale)
        plain = mtlfast.backward(other.losses(step), PCGrad(), shared=other.trunk, weighting=twin)
        assert torch.allclose(result.loss_weights, plain.loss_weights, rtol=1e-9)
        for k, (head, same) in enumerate(zip(net.heads, other.heads, strict=True)):
            assert torch.allclose(head.weight.grad, scale * same.weight.grad, rtol=1e-9)
            (own,) = torch.autograd.grad(other.losses(step)[k], same.weight)
            assert torch.allclose(same.weight.grad, plain.loss_weights[k] * own, rtol=1e-9)
        with torch.no_grad():
            for p in net.parameters():
                p.grad /= scale
        net.descend()
        other.descend()


@every_method
def test_a_step_that_fails_moves_nothing(name, device):
    class Fails(Sum):
        def solve(self, gram, step):
            raise RuntimeError("no direction")

    net = Net(device)
    made = MAKES[name]().to(device)
    mtlfast.backward(net.losses(0), Sum(), shared=net.trunk, weighting=made)
    before = copy.deepcopy(made)
    with pytest.raises(RuntimeError, match="no direction"):
        mtlfast.backward(net.losses(1), Fails(), shared=net.trunk, weighting=made)
    assert same_state(made, before)
    mtlfast.backward(net.losses(1), Sum(), shared=net.trunk, weighting=made)
    assert not same_state(made, before)


@every_method
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["losses", "norms"])
def test_a_step_that_is_not_finite_leaves_that_tasks_state(name, what, wrong, device):
    made = MAKES[name]().to(device)
    given = {"losses": torch.tensor([1.0, 2.0, 3.0]), "norms": torch.tensor([3.0, 2.0, 1.0])}
    given = {key: value.double().to(device) for key, value in given.items()}
    made.step_weights(given["losses"], norms=given["norms"]).commit()
    for from_elsewhere in (False, True):
        before = copy.deepcopy(made.state_dict())
        broken = {"losses": 2 * given["losses"], "norms": given["norms"].square()}
        broken[what][1] = wrong
        if from_elsewhere:
            made.update(**broken)
        else:
            weights = made.step_weights(broken["losses"], norms=broken["norms"])
            assert weights.loss_weights.isfinite().all() or what == "losses"
            weights.commit()
        for key, value in made.state_dict().items():
            if value.dim():
                assert value[1] == before[key][1], key
                assert name.startswith("GradNorm") <= torch.equal(value, before[key]), key


@every_method
@pytest.mark.parametrize("sizes", [(0, 1, 1), (0, 0, 0), (1e-300, 1, 1e300), (1e-310, 1, 1), (1e30, 1e-30, 1)])
def test_norms_of_every_size(name, sizes, device):
    made = MAKES[name]().to(device)
    losses = torch.tensor([1.0, 2.0, 3.0], device=device)
    for norms in ((1, 2, 3), sizes, sizes, (1, 2, 3)):
        step = made.step_weights(losses, norms=torch.tensor(norms, dtype=torch.float64, device=device))
        step.commit()
        assert step.loss_weights.isfinite().all()
        assert (step.loss_weights >= 0).all()
        for key, value in made.state_dict().items():
            assert value.isfinite().all() or key == "means", key


@pytest.mark.parametrize("name", [name for name in MAKES if name.startswith(("GradNorm", "Inverse"))])
def test_weights_add_up_to_the_number_of_tasks(name, device):
    made = MAKES[name]().to(device)
    for step in range(200):
        torch.manual_seed(step)
        norms, losses = torch.rand(2, K, dtype=torch.float64).to(device)
        weights = made.step_weights(losses, norms=norms)
        weights.commit()
        assert weights.loss_weights.sum().item() == pytest.approx(K, rel=1e-12)


@every_method
def test_absent_tasks_keep_their_state(name, device):
    made = MAKES[name]().to(device)
    losses, norms = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], dtype=torch.float64, device=device)
    made.step_weights(losses, norms=norms).commit()
    before = copy.deepcopy(made.state_dict())
    step = made.step_weights(losses[[0, 2]], tasks=(0, 2), norms=2 * norms[[2, 0]])
    step.commit()
    assert step.loss_weights.shape == (2,)
    fed = MAKES[name]().to(device)
    fed.load_state_dict(before)
    fed.update(losses=[losses[0], None, losses[2]], norms=2 * norms[[2, 0]])
    for key, value in made.state_dict().items():
        if value.dim():
            assert torch.equal(value[1].nan_to_num(), before[key][1].nan_to_num()), key
            assert torch.equal(value.nan_to_num(), fed.state_dict()[key].nan_to_num()), key
    if name.startswith("GradNorm"):
        assert not torch.equal(made.learned, before["learned"])
        assert made.current_weights.sum().item() == pytest.approx(K)


def test_a_call_takes_the_weights_as_they_stand(device):
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, device=device)
    made = GradNorm(K, lr=0.5).to(device)
    assert made(losses).item() == 7
    assert made.initial_losses.tolist() == [1, 2, 4]  # a call in training mode is a step
    assert made.current_weights.tolist() == [1, 1, 1]
    made.update(losses=losses, norms=torch.tensor([1.0, 2.0, 4.0]))
    weights = made.current_weights
    assert weights[2] < weights[0]
    for mode in (True, False):
        assert torch.allclose(made.train(mode)(losses), weights @ losses)
    assert torch.equal(made.current_weights, weights)
    total = made.train()((losses / 2).requires_grad_())
    made.update(losses=losses, norms=torch.ones(3))
    total.backward()  # whatever the weights are by now


def test_initial_losses(device):
    given = GradNorm(2, lr=0.1, initial_losses=[2, 4]).to(device)
    given.step_weights(torch.ones(2, device=device), norms=torch.ones(2)).commit()
    assert given.initial_losses.tolist() == [2, 4]
    given.reset()
    assert given.initial_losses.tolist() == [2, 4]
    first = GradNorm(2, lr=0.1).to(device)
    for losses in ((0.0, 3.0), (5.0, 1.0), (7.0, 7.0)):  # a loss of 0 is no scale
        first.step_weights(torch.tensor(losses, device=device), norms=torch.ones(2)).commit()
    assert first.initial_losses.tolist() == [5, 3]
    first.reset()
    assert first.initial_losses.isnan().all()


def test_layers_in_every_form():
    net = Net()
    everything = tuple(net.trunk[2].parameters())
    for form in (net.trunk[2], list(everything), net.trunk[2].parameters(), nn.ParameterList(everything)):
        made = GradNorm(K, layers=form)
        assert all(one is other for one, other in zip(made.layers, everything, strict=True))
        assert list(made.parameters()) == []
        assert not any("layers" in key for key in made.state_dict())
    assert GradNorm(K).layers is None
    # Copied with its model, it reads the copy's norms.
    pair = nn.ModuleDict({"net": net, "weighting": GradNorm(K, layers=net.last)})
    twin = copy.deepcopy(pair)
    assert twin["weighting"].layers[0] is twin["net"].last
    mtlfast.backward(twin["net"].losses(0), Sum(), shared=twin["net"].trunk, weighting=twin["weighting"])


def test_bad_arguments():
    net = Net()
    for make, message in (
        (lambda: GradNorm(2, alpha=-1), "GradNorm: alpha is -1, expected a number of at least 0"),
        (lambda: GradNorm(2, form="exp"), "GradNorm: form is 'exp', expected 'linear', 'log' or 'softmax'"),
        (lambda: GradNorm(2, optimizer="lion"), "GradNorm: optimizer is 'lion', expected 'adam' or 'sgd'"),
        (
            lambda: GradNorm(2, initial_losses=[0, 1]),
            "GradNorm: initial_losses is [0, 1], expected 2 finite numbers above 0",
        ),
        (lambda: GradNorm(2, layers=[]), "GradNorm: layers has no parameters, expected at least one"),
        (lambda: GradNorm(2, layers=nn.Tanh()), "GradNorm: layers has no parameters, expected at least one"),
        (
            lambda: GradNorm(2, layers=["last"]),
            "GradNorm: layers has a str, expected a module, a parameter or a list of parameters",
        ),
        (
            lambda: GradNorm(2, layers=3),
            "GradNorm: layers has a int, expected a module, a parameter or a list of parameters",
        ),
        (lambda: LRAnnealing(2, reference=2), "LRAnnealing: reference is 2, expected one of 2"),
        (lambda: LRAnnealing(2, norm_order=3), "LRAnnealing: norm_order is 3, expected 1 or 2"),
        (lambda: AdaptiveWeight(2, task=2), "AdaptiveWeight: task is 2, expected one of 2"),
        (lambda: AdaptiveWeight(2, eps=0), "AdaptiveWeight: eps is 0, expected a number in (0, 1]"),
        (
            lambda: InverseNormLoss(2).step_weights(torch.ones(2)),
            "InverseNormLoss: norms is None, expected the norms of the task gradients, which mtlfast.backward computes",
        ),
        (
            lambda: InverseNormLoss(2).step_weights(torch.ones(2), norms=torch.ones(3)),
            "InverseNormLoss: norms has shape [3], expected [2] as losses",
        ),
        (
            lambda: InverseNormLoss(2).update(norms=torch.ones(3)),
            "InverseNormLoss: got 3 norms, expected 2 as num_tasks",
        ),
        (
            lambda: GradNorm(2).update(losses=[1, None], norms=torch.ones(2)),
            "GradNorm: got 2 norms and 1 losses, expected equal numbers",
        ),
        (
            lambda: GradNorm(2).update(norms=torch.ones(2)),
            "GradNorm: losses is None, expected the tasks' losses as alpha is 1.5",
        ),
        (
            lambda: GradNorm(2).update(losses=[1.0, -1.0], norms=torch.ones(2)),
            "GradNorm: the loss of task 1 is -1, expected a number above 0 or equal to it",
        ),
        (
            lambda: mtlfast.backward(
                net.losses(0), Sum(), shared=net.trunk, weighting=GradNorm(K, layers=net.heads[0].weight)
            ),
            "GradNorm: layer 0, of shape [1, 5], is not in shared, expected shared parameters alone",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            make()
        assert str(raised.value).startswith(message)


def test_losses_of_any_sign_without_alpha(device):
    made = GradNorm(2, alpha=0.0, lr=0.1, optimizer="sgd").to(device)
    losses = torch.tensor([-1.0, 2.0], device=device)
    made.step_weights(losses, norms=torch.tensor([3.0, 1.0])).commit()
    assert made.current_weights.tolist() == pytest.approx([7 / 9, 11 / 9])
    assert made(losses).item() == pytest.approx(-7 / 9 + 22 / 9)
