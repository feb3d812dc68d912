"""What a step is made of, read from the StableHLO it is lowered to; no device needed.

A step is lowered for a GPU or a TPU on any machine: which kernel an attention takes and
in which precision a product is made is settled by then. What XLA makes of it is not:
`compiled`.
"""

import contextlib
import dataclasses
import functools
import math
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from vitssl.ops import accelerator

HOPPER = accelerator.HOPPER
# Of cuDNN, as jax counts it; only whether it is new enough matters.
_CUDNN = 91300
# Names of kernels of attention.
_FUSED, _SPLASH = "__cudnn$fmha", "splash_mha"


@contextlib.contextmanager
def traced_for(platform="cuda", capability=HOPPER):
    """Trace as on a device that need not be here.

    Args:
        platform: "cuda" or "tpu".
        capability: of an NVIDIA GPU, its compute capability.
    """
    if platform == "tpu":
        with mock.patch.object(jax, "default_backend", lambda: "tpu"):
            yield
        return

    def at_least(version):
        return capability >= tuple(map(int, version.split(".")))

    def exactly(version):
        return capability == tuple(map(int, version.split(".")))

    patch = functools.partial(mock.patch.object, autospec=False)
    with (
        patch(jax, "default_backend", lambda: "gpu"),
        patch(accelerator, "capability", lambda: capability),
        patch(cudnn, "check_cudnn_version", lambda: _CUDNN),
        patch(cudnn, "check_compute_capability", at_least),
        patch(cudnn, "is_cuda_compute_capability_equal", exactly),
    ):
        yield


def lowered(function, *args):
    """Return the StableHLO module of a function for a GPU; nothing is computed.

    Args:
        function: jitted.
        *args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: it calls the host (`jax.debug.print` and the like), which is lowered
            for devices that are here alone, and would stall a step.
    """
    with traced_for():
        low = function.trace(*args).lower(lowering_platforms=("cuda",))
    return low.compiler_ir("stablehlo")


@dataclasses.dataclass
class Counts:
    """What is in a module; bodies of loops count as often as they run.

    Attributes:
        products: FLOPs of matrix products and convolutions, by what a GPU makes them
            in: "bf16", "tf32" (float32 values at the default precision), "f32" (at the
            highest), "f32 as 3 bf16" (in parts).
        forward, backward: calls of a fused attention kernel.
        fused: their FLOPs.
        maps: products with an axis of heads: attention whose map is in memory.
        unfused: their FLOPs.
        literal: bytes of the largest constant.
    """

    products: dict[str, float] = dataclasses.field(default_factory=dict)
    forward: float = 0
    backward: float = 0
    fused: float = 0.0
    maps: float = 0
    unfused: float = 0.0
    literal: int = 0

    @property
    def flops(self) -> float:
        """FLOPs of all products, those of fused kernels too."""
        return sum(self.products.values()) + self.fused

    @property
    def float32(self) -> float:
        """Share of the FLOPs that are true float32 products."""
        return self.products.get("f32", 0.0) / max(1.0, self.flops)


def count(module) -> Counts:
    """Return what is in a StableHLO module."""
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    found = Counts()
    _Count(functions, found).block(functions["main"].regions[0].blocks[0], 1)
    return found


class _Count:
    """Adds what is in a function, and in those it calls, to some counts."""

    def __init__(self, functions, found: Counts):
        self._functions, self._found = functions, found

    def block(self, block, times):
        for op in block.operations:
            self._op(op.operation, times)

    def _op(self, op, times):
        name = op.name
        if name in ("func.call", "call"):
            callee = self._functions[op.attributes["callee"].value]
            self.block(callee.regions[0].blocks[0], times)
        elif name in ("stablehlo.dot_general", "stablehlo.convolution"):
            self._product(op, times)
        elif name == "stablehlo.custom_call":
            self._call(op, op.attributes["call_target_name"].value, times)
        elif name == "stablehlo.constant":
            self._constant(op)
        elif name == "stablehlo.while":
            self.block(op.regions[1].blocks[0], times * _trips(op))
        else:
            # Both branches of a condition count: an upper bound.
            for region in op.regions:
                for block in region.blocks:
                    self.block(block, times)

    def _product(self, op, times):
        left, right = (_shape(x) for x in op.operands)
        out = math.prod(_shape(op.results[0]))
        kind = _kind(op)
        if op.name == "stablehlo.convolution":
            # Every output is a sum over the kernel, but for its axis of outputs.
            features = _shape(op.results[0])[_features(op)]
            work = math.prod(right) / features
        else:
            work = math.prod(left[i] for i in _axes(op, "lhs_contracting"))
            # [B, T, heads, c] with one of its kind, or with a map [B, heads, T, S]: the
            # axes that both have in common are not the first of either.
            common = [_axes(op, f"{side}_batching") for side in ("lhs", "rhs")]
            heads = any(x != list(range(len(x))) for x in common)
            self._found.maps += times * heads
            self._found.unfused += 2.0 * times * out * work * heads
        flops = 2.0 * times * out * work
        self._found.products[kind] = self._found.products.get(kind, 0.0) + flops

    def _call(self, op, target, times):
        name, tokens = target, 1  # [B, T, heads, c]
        if target == "tpu_custom_call" and "kernel_name" in op.attributes:
            name, tokens = op.attributes["kernel_name"].value, -2  # [..., heads, T, c]
        if name.startswith((_FUSED, _SPLASH)):
            # Which keys a query sees may come before it, in integers.
            given = [x for x in op.operands if "f" in str(x.type.element_type)]
            rows, keys = map(_shape, given[:2])
            product = 2.0 * math.prod(rows) * keys[tokens]
            back = "Backward" in name or "dkv" in name
            # Two products; for the gradients the scores again, and four more.
            self._found.fused += times * (5 if back else 2) * product
            if back:
                self._found.backward += times
            else:
                self._found.forward += times

    def _constant(self, op):
        value = op.attributes["value"]
        if not value.is_splat:
            kind = op.results[0].type
            bits = getattr(kind.element_type, "width", 64)
            size = math.prod(kind.shape) * max(1, bits // 8)
            self._found.literal = max(self._found.literal, size)


def _shape(value):
    return list(value.type.shape)


def _kind(op) -> str:
    """Return what a GPU makes a product in, by the wider type of its factors."""
    types = {str(x.type.element_type) for x in op.operands}
    kind = "f64" if "f64" in types else "f32" if "f32" in types else min(types)
    if "algorithm" in op.attributes:
        text = str(op.attributes["algorithm"])
        made = text.partition("lhs_precision_type = ")[2].partition(",")[0]
        parts = text.partition("num_primitive_operations = ")[2].partition(",")[0]
        return made if parts == "1" else f"{kind} as {parts} {made}"
    name = "precision_config"
    highest = name in op.attributes and "HIGHEST" in str(op.attributes[name])
    return "tf32" if kind == "f32" and not highest else kind


def _axes(op, name) -> list[int]:
    """Return axes of a product, such as "lhs_contracting" ones."""
    text = str(op.attributes["dot_dimension_numbers"])
    _, found, rest = text.partition(f"{name}_dimensions = [")
    inside = rest.partition("]")[0] if found else ""
    return [int(i) for i in inside.split(",") if i.strip()]


def _features(op) -> int:
    """Return the axis of the output channels in the result of a convolution."""
    text = str(op.attributes["dimension_numbers"])
    return text.rpartition("->[")[2].partition("]")[0].split(", ").index("f")


def _trips(op) -> int:
    """Return how often the body of a loop runs: the bound its counter is compared to.

    1 where the condition is another (a loop that ends when something has converged).
    """
    found = 1
    for inner in op.regions[0].blocks[0].operations:
        if inner.operation.name == "stablehlo.constant":
            value = inner.operation.attributes["value"]
            if value.is_splat and "i32" in str(inner.operation.results[0].type):
                found = max(found, int(value.get_splat_value().value))
    return found
