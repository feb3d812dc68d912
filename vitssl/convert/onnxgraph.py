"""A ViT as an ONNX graph: pixels in, features and, of a classifier, logits out.

Needs the extra [onnx] to write, and no package of ours to run. The graph normalises
pixels by itself and takes any number of images of one size.

Source: onnx.ai/onnx/operators, opset 20.
"""

import pathlib
import types
from typing import Any

import numpy as np

from vitssl import errors, sizes
from vitssl.convert import backbone
from vitssl.models import posemb

OPSET, IR = 20, 10  # With GELU; read by onnxruntime since 1.17, early in 2024.
_WHOLE = 1_900_000_000  # Bytes: above, tensors are a file of their own, FILE.data.
SNIPPET = """\
import onnxruntime
session = onnxruntime.InferenceSession("{file}")
names = [output.name for output in session.get_outputs()]
# images: uint8 [B, H, W, C], of the size in session.get_inputs()[0].shape.
found = dict(zip(names, session.run(names, {"images": images})))
found["pooled"], found["tokens"]  # And "logits" of a classifier.
"""


def package() -> types.ModuleType:
    """Return the package `onnx`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnx
    except ImportError as e:
        raise errors.UsageError(
            "--layout=onnx needs the package onnx: pip install 'vitssl[onnx]'"
        ) from e
    return onnx


class _Graph:
    """Nodes and constants that are added to each other by name."""

    def __init__(self):
        self.onnx = package()
        self.nodes, self.constants = [], []

    def constant(self, array) -> str:
        """Add an array; float arrays become float32."""
        array = np.asarray(array)
        array = backbone.contiguous(array) if array.dtype.kind != "i" else array
        name = f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs, name: str = "", **attributes) -> str:
        """Add a node; inputs are names, or arrays. Return the name of its output."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        name = name or f"x{len(self.nodes)}"
        node = self.onnx.helper.make_node(kind, names, [name], **attributes)
        self.nodes.append(node)
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps the axis, -1 is the rest."""
        return self.op("Reshape", x, np.array(shape, np.int64))


def model(source: backbone.Backbone) -> Any:
    """Return the `onnx.ModelProto` of a ViT, and of its head if it has one.

    Input "images": uint8 [batch, H, W, C]. Outputs "pooled" [batch, D], "tokens"
    [batch, N, D] as `vitssl.load` gives them, and "logits" [batch, K].
    """
    module, leaves, about = source.module(dtype="float32"), source.leaves, source.about
    graph, size = _Graph(), sizes.pair(module.image_size)
    x = _embedded(graph, source, module, size)  # [B, P + N, D]
    rope, one = _rotation(module) if module.rope else None, np.ones(1)
    for i in range(module.depth):
        own = _under(leaves, f"encoder/block_{i}/")
        y = _norm(graph, x, own, "norm1", module.norm_eps)
        y = _attention(graph, y, own, module, rope)
        x = graph.op("Add", x, graph.op("Mul", y, own.get("ls1", one)))
        y = _norm(graph, x, own, "norm2", module.norm_eps)
        y = graph.op("Gelu", _linear(graph, y, own, "mlp/fc1"))
        y = _linear(graph, y, own, "mlp/fc2")
        x = graph.op("Add", x, graph.op("Mul", y, own.get("ls2", one)))
    x = _norm(graph, x, _under(leaves, "encoder/"), "norm", module.norm_eps)
    first = np.array([module.prefix], np.int64)
    last, axis = np.array([2**31], np.int64), np.array([1], np.int64)
    tokens = graph.op("Slice", x, first, last, axis, name="tokens")
    if about.pool == "cls":
        pooled = graph.op("Gather", x, np.array(0, np.int64), axis=1, name="pooled")
    else:
        pooled = graph.op("ReduceMean", tokens, axis, keepdims=0, name="pooled")
    kind, (h, w) = graph.onnx.TensorProto, module.table_grid
    outputs = {"pooled": (kind.FLOAT, ["batch", module.width])}
    outputs["tokens"] = (kind.FLOAT, ["batch", h * w, module.width])
    if "head/kernel" in leaves:
        y = graph.op("MatMul", pooled, leaves["head/kernel"])
        graph.op("Add", y, leaves["head/bias"], name="logits")
        outputs["logits"] = (kind.FLOAT, ["batch", len(leaves["head/bias"])])
    make = graph.onnx.helper
    given = ("images", kind.UINT8, ["batch", *size, source.channels])
    ends = [make.make_tensor_value_info(name, *x) for name, x in outputs.items()]
    starts = [make.make_tensor_value_info(*given)]
    whole = make.make_graph(graph.nodes, "vitssl", starts, ends, graph.constants)
    sets = [make.make_opsetid("", OPSET)]
    return make.make_model(whole, opset_imports=sets, ir_version=IR)


def save(made: Any, file: pathlib.Path) -> None:
    """Write a model; what one file cannot hold goes to FILE.data beside it."""
    onnx, large = package(), made.ByteSize() > _WHOLE
    onnx.save_model(
        made, str(file), save_as_external_data=large, location=f"{file.name}.data"
    )
    onnx.checker.check_model(str(file))


def _under(leaves, prefix) -> dict:
    return {
        k.removeprefix(prefix): x for k, x in leaves.items() if k.startswith(prefix)
    }


def _embedded(graph, source, module, size):  # -> [B, P + N, D]
    """Add what `ViT.start` does: normalised patches, positions, the prefix."""
    own, about, p = _under(source.leaves, "encoder/"), source.about, module.patch
    (h, w), c = module.table_grid, source.channels
    x = graph.op("Cast", "images", to=graph.onnx.TensorProto.FLOAT)
    std = np.array(about.std)
    x = graph.op("Mul", x, 1 / (255 * std))
    x = graph.op("Add", x, -np.array(about.mean) / std)
    x = graph.reshape(x, -1, h, p, w, p, c)
    x = graph.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    x = graph.reshape(x, -1, h * w, p * p * c)
    kernel = np.asarray(own["patch_embed/kernel"]).reshape(p * p * c, module.width)
    x = graph.op("Add", graph.op("MatMul", x, kernel), own["patch_embed/bias"])
    params = {"params": source.encoder()}
    x = graph.op("Add", x, module.apply(params, (h, w), method="position_table")[None])
    prefix = []
    if module.cls:
        trained = module.positions in ("learned", "learned_sincos")
        place = own["pos_embed"][:, :1] if trained and module.class_position else 0.0
        prefix.append(own["cls"] + place)
    if module.registers:
        prefix.append(own["registers"])
    if not prefix:
        return x
    prefix = np.concatenate(prefix, 1)  # [1, P, D]
    batch = graph.op("Shape", x, start=0, end=1)
    shape = graph.op("Concat", batch, np.array(prefix.shape[1:], np.int64), axis=0)
    return graph.op("Concat", graph.op("Expand", prefix, shape), x, axis=1)


def _rotation(module):
    """Return (cos, sin) [1, 1, T, c] of `posemb.rotate`, and its matrix of pairs."""
    width = module.width // module.heads
    how = (module.rope_theta, module.rope_unit, module.spacing)
    angles = posemb.rope_angles(module.table_grid, width, *how)
    angles = np.pad(angles, ((module.prefix, 0), (0, 0)))
    pairs = np.zeros((width, width))  # (a, b) -> (-b, a)
    even = np.arange(0, width, 2)
    pairs[even + 1, even], pairs[even, even + 1] = -1, 1
    return *(np.asarray(x)[None, None] for x in posemb.rotation(angles)), pairs


def _attention(graph, x, own, module, rope):  # [B, T, D] -> [B, T, D]
    d, heads = module.width, module.heads
    x = graph.reshape(_linear(graph, x, own, "attn/qkv"), 0, 0, 3, heads, d // heads)
    x = graph.op("Transpose", x, perm=[2, 0, 3, 1, 4])  # [3, B, heads, T, c]
    q, k, v = (graph.op("Gather", x, np.array(i, np.int64), axis=0) for i in range(3))
    if module.qk_norm:
        q = _norm(graph, q, own, "attn/q_norm", module.norm_eps)
        k = _norm(graph, k, own, "attn/k_norm", module.norm_eps)
    if rope:
        q, k = _turned(graph, q, *rope), _turned(graph, k, *rope)
    q = graph.op("Mul", q, np.array((d // heads) ** -0.5))
    k = graph.op("Transpose", k, perm=[0, 1, 3, 2])
    y = graph.op("Softmax", graph.op("MatMul", q, k), axis=-1)
    y = graph.op("Transpose", graph.op("MatMul", y, v), perm=[0, 2, 1, 3])
    return _linear(graph, graph.reshape(y, 0, 0, d), own, "attn/proj")


def _turned(graph, x, cos, sin, pairs):
    other = graph.op("MatMul", x, pairs)
    return graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", other, sin))


def _linear(graph, x, own, name):
    y = graph.op("MatMul", x, own[f"{name}/kernel"])
    return graph.op("Add", y, own[f"{name}/bias"])


def _norm(graph, x, own, name, eps):
    given = x, own[f"{name}/scale"], own[f"{name}/bias"]
    return graph.op("LayerNormalization", *given, axis=-1, epsilon=eps)
