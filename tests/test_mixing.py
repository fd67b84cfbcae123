"""Mixtures of the losses of samples by one backward pass, beside the stored way with the same mixtures."""

import pytest
from mixing_models import MIXINGS, MODELS, assert_as_stored, model

pytestmark = pytest.mark.native


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gram_matrix_and_the_update_are_those_of_the_stored_way(name, mixing):
    net = model(name)
    assert_as_stored(net, MIXINGS[mixing]())
