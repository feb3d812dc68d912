"""Counting the FLOPs of the matrix products of a function, without running it.

XLA's own count (`lowered.cost_analysis()`) has everything in it and counts the body of
a loop once; this one has products alone, and loops as often as they run.
"""

import math

import jax
from jax.extend import core


def products(function, *args) -> float:
    """Return 2 x the multiply-adds of all matrix products and convolutions.

    Args:
        function: pure; traced, not compiled.
        *args: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr):
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total += _convolution(eqn)
        else:
            # Both branches of a condition count: an upper bound.
            inner = sum(_of(j) for j in _inside(eqn.params.values()))
            total += inner * eqn.params.get("length", 1)
    return total


def _inside(values):
    """Yield the jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inside(value)


def _dot(eqn):
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return (
        2.0
        * math.prod(eqn.outvars[0].aval.shape)
        * math.prod(left[i] for i in contract)
    )


def _convolution(eqn):
    kernel = eqn.invars[1].aval.shape
    numbers = eqn.params["dimension_numbers"]
    features = kernel[numbers.rhs_spec[0]]
    out = math.prod(eqn.outvars[0].aval.shape)
    return 2.0 * out * math.prod(kernel) / features
