"""The pickles inside PyTorch files, interpreted without unpickling anything.

A pickle is a program for a small stack machine. Python's machine imports and calls
whatever the program names; this one has no import and no call: a name that is not in
`_BUILDERS` ends the reading, and the few that are there build plain data. Opcodes that
PyTorch never writes are refused too.
"""

import dataclasses
import pathlib
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from vitssl import errors

MAX_BYTES = 256 * 2**20  # Of a pickle: it holds names and numbers, tensors are apart.
MAX_OBJECTS = 20_000_000

DTYPES = {  # torch.FloatStorage and torch.float32 alike.
    name: np.dtype(dtype)
    for storage, dtype in {
        "Float": np.float32,
        "Double": np.float64,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
    for name in (f"{storage}Storage", np.dtype(dtype).name)
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A reference to the bytes of one or more tensors: file `key`, `count` elements."""

    key: str
    dtype: np.dtype | None
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor before its bytes are looked at; offset and stride are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name of the allow-list, as it stands on the stack."""

    path: str


class _Plain(dict):
    """An object of which only its attributes are kept (argparse.Namespace)."""


def read(data: bytes, where: str) -> Any:
    """Return the object of a pickle as dicts, lists, tuples, numbers and `Tensor`s.

    Protocols 2 to 5; `where` names the file in messages.

    Raises:
        CheckpointError: a name or an opcode that is not allowed, damage, more than
            `MAX_BYTES` or `MAX_OBJECTS`.
    """
    if len(data) > MAX_BYTES:
        raise errors.CheckpointError(
            f"{where}: its pickle has {len(data)} bytes, at most {MAX_BYTES} are read"
        )
    machine = _Machine(where)
    try:
        for i, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if i > MAX_OBJECTS:
                raise errors.CheckpointError(
                    f"{where}: more than {MAX_OBJECTS} objects in its pickle"
                )
            machine.step(opcode.name, argument)
            if machine.done:
                return _Plainer().plain(machine.stack.pop())
    except errors.CheckpointError:
        raise
    except RecursionError as e:
        raise errors.CheckpointError(f"{where}: nested too deeply") from e
    except Exception as e:  # noqa: BLE001 - damage shows in any way it likes.
        raise errors.CheckpointError(f"{where}: damaged pickle ({e})") from e
    raise errors.CheckpointError(f"{where}: truncated, its pickle has no end")


class _Machine:
    """The stack machine; `step` executes one opcode."""

    def __init__(self, where: str):
        self.where, self.done = where, False
        self.stack, self.marks, self.memo = [], [], {}

    def step(self, name: str, argument):
        """Execute one opcode, or refuse it."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        else:
            run = getattr(self, f"_{name.lower()}", None)
            if run is None:
                raise errors.CheckpointError(
                    f"{self.where}: refused, opcode {name} is none that torch.save "
                    "writes for weights"
                )
            run(argument)

    def _since_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _proto(self, _):
        pass

    _frame = _proto

    def _stop(self, _):
        self.done = True

    def _mark(self, _):
        self.marks.append(len(self.stack))

    def _pop(self, _):
        self.stack.pop()

    def _pop_mark(self, _):
        self._since_mark()

    def _dup(self, _):
        self.stack.append(self.stack[-1])

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, index):
        self.memo[index] = self.stack[-1]

    _put = _long_binput = _binput

    def _binget(self, index):
        self.stack.append(self.memo[index])

    _get = _long_binget = _binget

    def _tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _):
        self._last(1)

    def _tuple2(self, _):
        self._last(2)

    def _tuple3(self, _):
        self._last(3)

    def _last(self, count):
        if len(self.stack) < count:
            raise ValueError("stack underflow")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def _list(self, _):
        self.stack.append(self._since_mark())

    def _append(self, _):
        value = self.stack.pop()
        _want(self.stack[-1], list).append(value)

    def _appends(self, _):
        items = self._since_mark()
        _want(self.stack[-1], list).extend(items)

    def _dict(self, _):
        self.stack.append(_pairs(self._since_mark()))

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        _want(self.stack[-1], dict)[key] = value

    def _setitems(self, _):
        items = self._since_mark()
        _want(self.stack[-1], dict).update(_pairs(items))

    def _additems(self, _):
        items = self._since_mark()
        _want(self.stack[-1], set).update(items)

    def _frozenset(self, _):
        self.stack.append(frozenset(self._since_mark()))

    def _global(self, argument):
        self._name(argument.replace(" ", "."))

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self._name(f"{module}.{name}")

    def _name(self, path):
        if "float8" in path.lower() and path.startswith("torch."):
            raise errors.CheckpointError(
                f"{self.where}: {path[:80]}: 8-bit floats, which are weights only with "
                "their scales; save them dequantised, as float32 or float16"
            )
        if path not in _BUILDERS and _dtype(path) is None:
            raise errors.CheckpointError(
                f"{self.where}: refused, it wants {path}, which is not data; only "
                "tensors, containers, numbers and texts are read. Save just the "
                "state_dict in PyTorch, or as .safetensors"
            )
        self.stack.append(_Name(path))

    def _reduce(self, _):
        arguments, name = self.stack.pop(), _want(self.stack.pop(), _Name)
        if name.path not in _BUILDERS:
            raise ValueError(f"{name.path} is no function")
        self.stack.append(_BUILDERS[name.path](*_want(arguments, tuple)))

    _newobj = _reduce

    def _build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Plain):
            target.update(_want(state, dict))
        # Else: attributes of a container ("_metadata" of a state dict); no weights.

    def _binpersid(self, _):
        kind, storage, key, _, count = _want(self.stack.pop(), tuple)
        dtype = _dtype(_want(storage, _Name).path)
        if kind != "storage" or (dtype is None and storage.path != _UNTYPED):
            raise ValueError(f"unknown persistent object {kind!r}")
        self.stack.append(Storage(str(key), dtype, int(count)))


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS: dict[str, Callable] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


def _want(value, kind):
    """Return the value if it is of a kind, else call the pickle damaged."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _pairs(items):
    if len(items) % 2:
        raise ValueError("a key without a value")
    return dict(zip(items[::2], items[1::2], strict=True))


def _dtype(path):
    """Return the dtype that torch.<name> or torch.storage.<name> stands for."""
    module, _, name = path.rpartition(".")
    return DTYPES.get(name) if module in ("torch", "torch.storage") else None


def _tensor(storage, offset, shape, stride, *_):
    """torch._utils._rebuild_tensor_v2 and _v3 without gradients, hooks and metadata."""
    return Tensor(_want(storage, Storage), int(offset), _ints(shape), _ints(stride))


def _tensor_v3(storage, offset, shape, stride, grad, hooks, dtype, *_):
    found = _tensor(storage, offset, shape, stride)
    return dataclasses.replace(found, dtype=_dtype(_want(dtype, _Name).path))


def _ints(values) -> tuple[int, ...]:
    found = tuple(int(_want(v, int)) for v in _want(values, tuple))
    if any(v < 0 for v in found):
        raise ValueError(f"negative size or stride in {found}")
    return found


def _scalar(dtype, data):
    """numpy's scalar, kept as a Python number."""
    return np.frombuffer(_encoded(data), dtype)[0].item()


def _encoded(data):
    return data.encode("latin1") if isinstance(data, str) else data


_NUMPY_CODES = frozenset("b1 i1 u1 i2 u2 f2 i4 u4 f4 i8 u8 f8".split())


def _numpy_dtype(code, *_):
    if _want(code, str) not in _NUMPY_CODES:
        raise ValueError(f"numpy dtype {code!r}")
    return np.dtype(code)


def _path(parts):
    """A path as text; its first part may be the root."""
    return str(pathlib.PurePosixPath(*(_want(p, str) for p in parts)))


_UNTYPED = "torch.storage.UntypedStorage"
_BUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": lambda items=(): dict(items),
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda items=(): dict(items),
    "argparse.Namespace": lambda: _Plain(),
    "builtins.set": lambda items=(): set(items),
    "builtins.slice": lambda *items: items,
    "pathlib.PosixPath": lambda *parts: _path(parts),
    "pathlib._local.PosixPath": lambda *parts: _path(parts),
    "torch.Size": lambda items=(): tuple(items),
    "torch.device": lambda *name: ":".join(map(str, name)),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    _UNTYPED: lambda *_: None,
    # Arrays of numpy are states of random generators, not weights: left out.
    "numpy.core.multiarray._reconstruct": lambda *_: None,
    "numpy._core.multiarray._reconstruct": lambda *_: None,
    "numpy.ndarray": lambda *_: None,
    "_codecs.encode": lambda text, *_: _encoded(text),
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


class _Plainer:
    """Copies nested containers, our own kinds as Python's and names as text.

    It counts, since a small pickle can share its way to a tree of any size.
    """

    def __init__(self):
        self.count = 0

    def plain(self, value):
        """Return a copy."""
        self.count += 1
        if self.count > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} objects")
        if isinstance(value, dict):
            return {key: self.plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [self.plain(v) for v in value]
        if type(value) is tuple:
            return tuple(map(self.plain, value))
        if isinstance(value, _Name):
            return value.path
        return value
