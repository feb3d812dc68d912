"""What a method may know of its run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from vitssl.methods import base, table


@pytest.mark.parametrize("every, due", [(1, range(8)), (3, (2, 5, 7))])
def test_what_is_dear_is_measured_when_it_is_logged(every, due):
    run = base.Run(8, 4, 2, 10, 3, (0.5,), (0.5,), log_every=every)

    @jax.jit
    def measured(step, x):
        return run.when_logged(step, lambda x: {"rank": x.sum()}, x)

    found = [measured(jnp.int32(i), jnp.ones(5))["rank"] for i in range(8)]
    want = [5.0 if i in due else np.nan for i in range(8)]
    np.testing.assert_array_equal(found, want)
    _, slope = jax.value_and_grad(lambda x: x.sum() + 0 * measured(0, x)["rank"])(
        jnp.ones(5)
    )
    assert slope.shape == (5,)


def test_a_method_that_stores_tokens_says_how_they_are_made():
    class Half(toy.Toy, base.Storing):
        def boundary(self, live, phase):
            return 1

        def store_faults(self):
            return iter(())

    with pytest.raises(TypeError, match="abstract.*frozen_tokens"):
        Half(run=None)


def test_whoever_has_a_boundary_can_make_the_tokens_behind_it():
    for kind in table.METHODS.values():
        own = kind.boundary is not base.Method.boundary
        assert own == issubclass(kind, base.Storing), kind
