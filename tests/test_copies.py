"""A copied, pickled or saved aggregator has the state and the generator, and continues like the original."""

import copy
import pickle

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks, products

from mtlfast.aggregation import Compose, GradVac, NormBalance, PCGrad, Random

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda made: pickle.loads(pickle.dumps(made))}
DRAWING = {
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "Random": Random,
    "Compose": lambda generator: Compose(NormBalance(), PCGrad(generator=generator)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_goes_on_as_the_original(name, copied, device):
    method = METHODS[name]
    (num_tasks, *_) = numbers_of_tasks(method, 3, 4)
    grams = [products(method, torch.randn(num_tasks, 9, dtype=torch.float64)).to(device) for _ in range(3)]
    made = method.make()
    made.weights(grams[0], losses=losses(num_tasks, device))
    again = COPIES[copied](made)
    other = copy.deepcopy(made) if copied == "copy" else made  # a shallow copy shares its buffers, as modules' do
    for gram in grams[1:]:
        torch.manual_seed(1)
        wanted = other.weights(gram, losses=losses(num_tasks, device))
        torch.manual_seed(1)
        assert torch.equal(again.weights(gram, losses=losses(num_tasks, device)), wanted)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", DRAWING)
def test_a_copy_has_a_generator_of_its_own_at_the_same_place(name, copied, device):
    gram = torch.eye(6, dtype=torch.float64, device=device) - 0.1
    made = DRAWING[name](generator=torch.Generator(device).manual_seed(3))
    made.weights(gram)
    again = COPIES[copied](made)
    if copied == "copy" and name in ("GradVac", "Compose"):
        pytest.skip("a shallow copy of a module shares its buffers and its inner modules")
    for _ in range(2):
        first = again.weights(gram)
        assert torch.equal(first, made.weights(gram))


@pytest.mark.parametrize("name", [*METHODS, *DRAWING])
def test_a_state_dict_holds_tensors_alone(name):
    if name in METHODS:
        method = METHODS[name]
        made = method.make()
        (num_tasks, *_) = numbers_of_tasks(method, 3, 4)
        gram = products(method, torch.randn(num_tasks, 9, dtype=torch.float64))
        made.weights(gram, losses=losses(num_tasks))
    else:
        made = DRAWING[name](generator=None)
    holder = torch.nn.Module()
    holder.net, holder.aggregator = torch.nn.Linear(2, 2), made
    assert all(isinstance(value, torch.Tensor) for value in holder.state_dict().values())
    holder.load_state_dict(copy.deepcopy(holder.state_dict()))


def test_a_checkpoint_of_before_loads():
    made = PCGrad(generator=torch.Generator().manual_seed(1))
    before = made.generator.get_state()
    made.load_state_dict({"_extra_state": None})
    assert torch.equal(made.generator.get_state(), before)
    with_one, without = PCGrad(generator=torch.Generator().manual_seed(9)), PCGrad()
    without.load_state_dict(with_one.state_dict())
    with_one.load_state_dict(without.state_dict())


@pytest.mark.parametrize("make", [PCGrad, GradVac, Random])
def test_a_generator_is_one(make):
    with pytest.raises(TypeError, match=rf"{make.__name__}: generator is a int, expected a torch.Generator or None"):
        make(generator=3)
