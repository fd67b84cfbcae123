"""Groups that are no partition, names that are missing, and methods that take no groups: one sentence each."""

import pytest
import torch
from cases import draw_rows
from elementwise import METHODS as ELEMENT_WISE
from grouped import Trunk, losses_of, net
from torch import nn

import mtlfast
from mtlfast import TaskGradients
from mtlfast.aggregation import MGDA, ConFIG, PCGrad, UPGrad


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.lora_B["default"](self.lora_A["default"](x)))


def test_lora_has_three_groups():
    torch.manual_seed(0)
    trunk = Lora().double()
    _, heads, x = net()
    step = mtlfast.backward(losses_of(trunk, heads, x), ConFIG(), shared=trunk, groups="lora")
    assert step.groups == ("lora_A", "lora_B", "other")


BAD = {
    "a word": ("layer", ValueError, 'groups is \'layer\', expected "tensor", "module"'),
    "a depth of 0": (0, ValueError, "groups is 0, expected a depth of at least 1"),
    "a flag": (True, TypeError, "groups is a bool, expected"),
    "a number": (1.5, TypeError, "groups is a float, expected"),
    "an unknown name": (["first", "blocks.7"], ValueError, "groups has 'blocks.7', expected the name of a shared"),
    "an unknown class": ([nn.Conv2d], ValueError, "groups has Conv2d, expected the class of a module in shared"),
    "another class": ([int], TypeError, "groups has a type, expected module names or classes"),
    "a parameter in none": (["blocks"], ValueError, "first.weight is in none of the groups, expected each shared"),
    "overlapping": (
        ["first", "blocks", "blocks.0"],
        ValueError,
        "blocks.0.scale is in the groups 'blocks' and 'blocks.0'",
    ),
    "no name": (lambda name: None, TypeError, "groups returned None for first.weight, expected the name of its group"),
    "a class": (nn.Linear, TypeError, r"groups is the class Linear, expected a list of classes such as \[Linear\]"),
    "a class of no module": (int, TypeError, "groups is a type, expected"),
    "a module": (nn.Linear(1, 1), TypeError, "groups is a Linear, expected a list of module names, or a dict of mod"),
    "a list of modules": (
        [nn.Linear(1, 1)],
        TypeError,
        "groups has a Linear, expected module names or classes, or a d",
    ),
    "lora without any": (
        "lora",
        ValueError,
        'groups is "lora", expected a shared parameter that is in a module lora_A',
    ),
    "a number in a dict": ({"a": 3}, TypeError, r"groups\['a'\] has a int, expected names, parameters or modules"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_partition_is_refused_before_any_pass(what):
    trunk, heads, x = net()
    groups, error, message = BAD[what]
    with pytest.raises(error, match=message):
        mtlfast.backward(losses_of(trunk, heads, x), PCGrad(), shared=trunk, groups=groups)
    assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])


def test_names_are_needed_for_groups_by_name():
    trunk, heads, x = net()
    for groups in ("module", 1, "lora", ["first"], lambda name: name):
        with pytest.raises(ValueError, match="groups needs the parameters' names, expected shared to be a module"):
            mtlfast.backward(losses_of(trunk, heads, x), PCGrad(), shared=list(trunk.parameters()), groups=groups)
    step = mtlfast.backward(losses_of(trunk, heads, x), PCGrad(), groups="tensor")  # found parameters have no names
    assert len(step.groups) == 8


def test_found_parameters_have_no_names():
    trunk, heads, x = net()
    features = trunk(x)
    losses = [(head(features) - k).square().mean() for k, head in enumerate(heads)]
    message = (
        "groups needs the parameters' names, which are not known with features= or without shared=, expected shared"
    )
    for groups in ("module", 1, "lora", ["first"], lambda name: name):
        for found in ({"features": features}, {}):
            with pytest.raises(ValueError, match=message):
                mtlfast.backward(losses, PCGrad(), groups=groups, **found)
    for given in ({"features": features}, {"shared": list(trunk.parameters())}):
        with pytest.raises(ValueError, match="groups has Linear, expected shared to be a module or several"):
            mtlfast.backward(losses, PCGrad(), groups=[nn.Linear], **given)
    assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])


def test_a_class_that_shared_itself_is_of_names_its_group():
    trunk, heads, x = net()
    for groups in ([Trunk], [nn.Module]):
        assert mtlfast.backward(losses_of(trunk, heads, x), PCGrad(), shared=trunk, groups=groups).groups == ("Trunk",)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (5, TypeError, 'groups is a int, expected "tensor" or a list with an entry for each of 2 tensors'),
        ({0, 1}, TypeError, 'groups is a set, expected "tensor" or a list'),
        (torch.tensor([0, 1]), TypeError, 'groups is a Tensor, expected "tensor" or a list'),
        ("layer", ValueError, "groups is 'layer', expected \"tensor\" or an entry for each of 2 tensors"),
        ([0], ValueError, r'groups is \[0\], expected "tensor" or an entry for each of 2 tensors'),
        ([0, 1.5], TypeError, "groups has 1.5 for tensor 1, expected the number or the name of a group"),
        ([None, "a"], TypeError, "groups has None for tensor 0, expected the number or the name of a group"),
    ],
)
def test_groups_of_a_call_by_hand(groups, error, message):
    grads = TaskGradients.from_rows(draw_rows(2, [(4,), (3,)]))
    with pytest.raises(error, match=f"^PCGrad: {message}"):
        PCGrad()(grads, groups=groups)


def test_element_wise_methods_and_features_take_no_groups():
    trunk, heads, x = net()
    with pytest.raises(TypeError, match="Agreeing: got groups, expected none, because the method works element by"):
        mtlfast.backward(losses_of(trunk, heads, x), ELEMENT_WISE["Agreeing"].make(), shared=trunk, groups="tensor")
    features = trunk(x)
    losses = [(head(features) - k).square().mean() for k, head in enumerate(heads)]
    with pytest.raises(ValueError, match="got groups= beside at, expected one of them"):
        mtlfast.backward(losses, PCGrad(), at=features, groups="tensor")
    assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])


@pytest.mark.parametrize("name", ["MoCo", "Bloop"])
def test_methods_with_state_for_each_parameter_take_no_groups(name):
    trunk, heads, x = net()
    with pytest.raises(TypeError, match=f"{name}: got groups, expected none, because the method keeps state for each"):
        mtlfast.backward(losses_of(trunk, heads, x), ELEMENT_WISE[name].make(), shared=trunk, groups="tensor")
    assert all(p.grad is None for p in trunk.parameters())


def test_counts_of_solves_bind_no_groups():
    trunk, heads, x = net()
    for method in (UPGrad(), MGDA()):
        for groups in ("tensor", 1, None, "tensor"):
            mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups=groups)


def test_names_of_modules_may_have_spaces():
    trunk = nn.ModuleDict({"left eye": nn.Linear(2, 1), "right eye": nn.Linear(2, 1)})
    losses = [module(torch.ones(2)).sum() * w for w in (1, 2) for module in trunk.values()]
    assert mtlfast.backward(losses, PCGrad(), shared=trunk, groups="module").groups == ("left eye", "right eye")
