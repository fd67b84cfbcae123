"""The implicit way beside the stored one on models of many constructions: G, the update, and what the plan says."""

import pytest
import zoo_layers  # noqa: F401  adds its constructions, as do the others
import zoo_networks  # noqa: F401
import zoo_odd  # noqa: F401
import zoo_products  # noqa: F401
from zoo import CONSTRUCTIONS, assert_gradients_close, assert_gram_close, assert_planned, step

pytestmark = pytest.mark.native


@pytest.mark.whole
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_construction_has_the_gram_matrix_and_the_update_of_the_stored_way(name):
    construction = CONSTRUCTIONS[name]
    stored, expected = step(construction.make, "stored")
    implicit, got = step(construction.make, "implicit")
    assert_gram_close(implicit.gram, stored.gram)
    assert_gradients_close(got, expected)
    assert_planned(construction, implicit)
