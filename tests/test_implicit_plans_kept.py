"""A kept plan is not used for a model that has changed."""

import pytest
import torch
from torch import Tensor, nn
from zoo import assert_gradients_close, assert_gram_close, three_losses

import mtlfast
from mtlfast.aggregation import Constant

pytestmark = pytest.mark.native


class Changing(nn.Module):
    """A model whose graph follows its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 16), nn.BatchNorm1d(16)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.twice, self.hooked = False, False
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        y = self.first(self.embedding(ids).mean(1))
        if self.hooked:
            y.register_hook(lambda g: 2 * g)
        y = self.norm(y)
        return self.last(self.first(y.tanh()) if self.twice else y.sin())


CHANGES = {
    "nothing": lambda model: None,
    "evaluation": lambda model: model.eval(),
    "training": lambda model: model.train(),
    "a hook": lambda model: setattr(model, "hooked", True),
    "no hook": lambda model: setattr(model, "hooked", False),
    "a second use": lambda model: setattr(model, "twice", True),
    "one use": lambda model: setattr(model, "twice", False),
    "a padding index": lambda model: setattr(model.embedding, "padding_idx", 3),
    "another padding index": lambda model: setattr(model.embedding, "padding_idx", 5),
    "a hook at a parameter": lambda model: setattr(model, "of", model.last.weight.register_hook(lambda g: g.sin())),
    "no hook at a parameter": lambda model: model.of.remove(),
    "a tied weight": lambda model: setattr(model.last, "weight", model.first.weight),
    "a frozen parameter": lambda model: model.embedding.requires_grad_(False),
}

# What the plan must say after a change, which a plan from before it does not say.
REASONS = {
    "a hook": ("first.weight", "has a hook"),
    "a hook at a parameter": ("last.weight", "it has a tensor hook"),
    "no hook at a parameter": ("last.weight", "fewer FLOPs"),
}


def test_each_step_on_a_model_that_changes_is_that_of_the_stored_way():
    """One model goes through all changes, so that each step could find the plans of those before."""
    models: dict[str, Changing] = {}
    for way in ("stored", "implicit"):
        torch.manual_seed(3)
        models[way] = Changing()
    for number, (name, change) in enumerate(CHANGES.items()):
        for model in models.values():
            change(model)
        for rows in (2, 3, 2):
            found = {}
            for way, model in models.items():
                torch.manual_seed(number)
                ids = torch.randint(8, (rows, 3))
                model.zero_grad()
                losses = three_losses(model(ids))
                result = mtlfast.backward(
                    losses, Constant([1.0, 2.0, 3.0]), shared=model, jacobian=way, diagnostics=True
                )
                found[way] = result, {name: p.grad for name, p in model.named_parameters()}
            (stored, expected), (implicit, got) = found["stored"], found["implicit"]
            assert implicit.plan.way == "implicit", name
            layer, reason = REASONS.get(name, ("last.bias", "is no matrix"))
            assert reason in next(x.reason for x in implicit.plan.layers if x.name == layer)
            assert_gram_close(implicit.gram, stored.gram)
            assert_gradients_close(got, expected)
