"""Gradients that were summed in half precision, found in the program of a loss."""

import jax
import jax.numpy as jnp
import numpy as np

# What adds up; everything else hands a gradient on.
_SUMS = {
    *("reduce_sum", "dot_general", "conv_general_dilated", "cumsum", "scatter-add"),
    *("reduce_window_sum", "psum"),
}
_INSIDE = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def sums(loss, params) -> dict[str, set[str]]:
    """Return {leaf: sums in half precision, the last before its gradient}.

    Args:
        loss: of {name: leaf}, a scalar; only traced.
        params: arrays or shapes.
    """
    closed, shape = jax.make_jaxpr(jax.grad(loss), return_shape=True)(params)
    frame = _Frame(closed.jaxpr)
    each = zip(shape, closed.jaxpr.outvars, strict=True)
    found = {name: set(frame.above(var)) for name, var in each}
    return {name: made for name, made in found.items() if made}


class _Frame:
    """A jaxpr, and the operands it was called with in the frame around it."""

    def __init__(self, jaxpr, around=None, operands=()):
        self._made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._around = around
        given = zip(reversed(jaxpr.invars), reversed(operands), strict=False)
        self._given, self._seen = dict(given), set()

    def above(self, var):
        """Yield the nearest sums above a value that are in half precision."""
        if isinstance(var, jax.extend.core.Literal) or var in self._seen:
            return
        self._seen.add(var)
        eqn = self._made.get(var)
        if eqn is None:
            if var in self._given:
                yield from self._around.above(self._given[var])
        elif eqn.primitive.name in _SUMS:
            if jnp.issubdtype(var.aval.dtype, jnp.floating):
                if np.dtype(var.aval.dtype).itemsize < 4:
                    yield f"{eqn.primitive.name} {var.aval.str_short()}"
        elif inner := _inner(eqn):
            at = list(eqn.outvars).index(var)
            for jaxpr in inner:
                frame = _Frame(jaxpr, self, eqn.invars)
                yield from frame.above(jaxpr.outvars[at])
        else:
            for x in eqn.invars:
                yield from self.above(x)


def _inner(eqn):
    found = [eqn.params[k] for k in _INSIDE if k in eqn.params]
    found += eqn.params.get("branches", ())
    if "body_jaxpr" in eqn.params:
        found = [eqn.params["body_jaxpr"]]
    return [getattr(j, "jaxpr", j) for j in found]
