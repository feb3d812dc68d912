"""Pickles of arrays and plain data, interpreted without unpickling anything.

Weights of PyTorch (see `convert.reader_torch`) and CIFAR come as such.

A pickle is a program for a small stack machine. Python's machine imports and calls
whatever the program names; this one has no import and no call: a name that is not in
`_BUILDERS` ends the reading, and the few that are there build plain data. Opcodes that
such files never have are refused too.

A restricted `pickle.Unpickler` would be no smaller and less safe: it sets attributes of
what it was allowed to find, reserves memory by the numbers in the program, and hashes
any tuple. Here everything that can cost more than the program is long is counted.
"""

import pathlib
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vitssl import errors

MAX_BYTES = 256 * 2**20  # Of a pickle: it holds names and numbers, tensors are apart.
MAX_BUILT = 256 * 2**20  # Bytes that its builders may make of what is there already.
MAX_OBJECTS = 2_000_000  # Opcodes, and objects once all that is shared is unfolded.
MAX_DEPTH = 50  # Of containers in containers.
# Tuples that are keys, and items of each: unlike texts, tuples can be made to collide.
MAX_TUPLES, MAX_FLAT = 10_000, 8
_ARGUMENTS = 100  # Most that a builder is given: of a path, a part each.
_ITEM = 64  # Bytes of an item of a container, about.

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


class Storage(NamedTuple):
    """A reference to the bytes of one or more tensors: file `key`."""

    key: str
    dtype: np.dtype | None


class _Name(str):
    """A name of the allow-list, as it stands on the stack."""


class _Plain(dict):
    """An object of which only its attributes are kept (argparse.Namespace)."""


class _Array:
    """An array of numpy, before and after its state is known."""

    value = None


def read(data: bytes, where: str, tensor: Callable | None = None) -> Any:
    """Return the object of a pickle as dicts, lists, tuples, numbers and arrays.

    Protocols 2 to 5; what Python 2 wrote as `str` is text of Latin-1.

    Args:
        data: the pickle.
        where: names the file in messages.
        tensor: (storage, offset, shape, stride, dtype or None) -> array; offset and
            strides are in elements, and nothing of them is checked but their types.
            None refuses tensors.

    Raises:
        CheckpointError: a name or an opcode that is not allowed, damage, more than
            one of the limits of this module.
    """
    if len(data) > MAX_BYTES:
        raise errors.CheckpointError(
            f"{where}: its pickle has {len(data)} bytes, at most {MAX_BYTES} are read"
        )
    machine = _Machine(where, tensor)
    try:
        for i, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if i > MAX_OBJECTS:
                raise ValueError(f"more than {MAX_OBJECTS} objects")
            machine.step(opcode.name, argument)
            if machine.done:
                return _Plainer().plain(machine.stack.pop())
    except errors.CheckpointError:
        raise
    except Exception as e:  # noqa: BLE001 - damage shows in any way it likes.
        raise errors.CheckpointError(
            f"{where}: damaged pickle ({errors.told(e)})"
        ) from e
    raise errors.CheckpointError(f"{where}: truncated, its pickle has no end")


class _Machine:
    """The stack machine; `step` executes one opcode."""

    def __init__(self, where: str, tensor: Callable | None):
        self.where, self.tensor, self.done = where, tensor, False
        self.stack, self.marks, self.memo = [], [], {}
        self.built = self.tuples = 0

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
                    f"{self.where}: refused, opcode {name} is none of plain data"
                )
            run(argument)

    def spend(self, values):
        """Count what is about to be copied: values, and the items of each.

        Anything else on the stack costs an opcode, but these may have been built once
        and be named many times.
        """
        self.built += _ITEM * len(values)
        for value in values:
            if isinstance(value, tuple | list | dict | set | frozenset):
                self.built += _ITEM * len(value)
            elif isinstance(value, str | bytes):
                self.built += len(value)
        if self.built > MAX_BUILT:
            raise ValueError(f"it builds more than {MAX_BUILT} bytes")

    def key(self, value):
        """Return a key, or an item of a set, whose hash costs next to nothing."""
        if type(value) is tuple:
            self.tuples += 1
            if self.tuples > MAX_TUPLES or len(value) > MAX_FLAT:
                raise ValueError("too many or too long tuples as keys")
        for part in value if type(value) is tuple else (value,):
            # Equal hashes of larger numbers are easily found.
            small = not isinstance(part, int) or abs(part) < 2**60
            if not isinstance(part, _SCALARS) or not small:
                raise ValueError(f"a {type(part).__name__} in a key")
        return value

    def pairs(self, items) -> dict:
        """Return a dict of keys and values in turn."""
        if len(items) % 2:
            raise ValueError("a key without a value")
        return dict(zip(map(self.key, items[::2]), items[1::2], strict=True))

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
        self.stack.append(self.pairs(self._since_mark()))

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        _want(self.stack[-1], dict)[self.key(key)] = value

    def _setitems(self, _):
        items = self._since_mark()
        _want(self.stack[-1], dict).update(self.pairs(items))

    def _additems(self, _):
        items = self._since_mark()
        _want(self.stack[-1], set).update(map(self.key, items))

    def _frozenset(self, _):
        self.stack.append(frozenset(map(self.key, self._since_mark())))

    def _global(self, argument):
        self._name(argument.replace(" ", "."))

    def _stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.spend((name, module))
        self._name(f"{_want(module, str)}.{_want(name, str)}")

    def _name(self, path):
        if "float8" in path.lower() and path.startswith("torch."):
            raise errors.CheckpointError(
                f"{self.where}: {path[:80]}: 8-bit floats, which are weights only with "
                "their scales; save them dequantised, as float32 or float16"
            )
        # So protocol 2 writes what Python 2 called it.
        path = path.replace("__builtin__.", "builtins.", 1)
        if path not in _BUILDERS and _dtype(path) is None:
            fix = "; save just the state_dict in PyTorch, or as .safetensors"
            raise errors.CheckpointError(
                f"{self.where}: refused, it wants {errors.told(path)!r}, which is not "
                "data; only arrays, containers, numbers and texts are read"
                + fix
                * bool(self.tensor)
            )
        self.stack.append(_Name(path))

    def _reduce(self, _):
        arguments, name = self.stack.pop(), _want(self.stack.pop(), _Name)
        if name not in _BUILDERS:
            raise ValueError(f"{name} is no function")
        if len(_want(arguments, tuple)) > _ARGUMENTS:
            raise ValueError(f"{name} of {len(arguments)} arguments")
        self.spend(arguments)
        self.stack.append(_BUILDERS[name](self, *arguments))

    _newobj = _reduce

    def _build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Plain):
            self.spend((state,))
            target.update(_want(state, dict))
        elif isinstance(target, _Array):
            target.value = _numbers(*_want(state, tuple))
        elif isinstance(target, np.dtype) and ">" in _want(state, tuple)[:2]:
            raise ValueError("numbers of a big-endian machine")
        # Else: attributes of a container ("_metadata" of a state dict); no weights.

    def _binpersid(self, _):
        kind, storage, key, _, count = _want(self.stack.pop(), tuple)
        dtype = _dtype(_want(storage, _Name))
        if kind != "storage" or (dtype is None and storage != _UNTYPED):
            raise ValueError("a persistent object that is no storage")
        _want(count, int)
        self.stack.append(Storage(_want(key, str), dtype))


_SCALARS = (str, bytes, int, float, type(None))
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
        kind = getattr(kind, "__name__", kind)
        raise ValueError(f"a {type(value).__name__} where a {kind} belongs")
    return value


def _dtype(path):
    """Return the dtype that torch.<name> or torch.storage.<name> stands for."""
    module, _, name = path.rpartition(".")
    return DTYPES.get(name) if module in ("torch", "torch.storage") else None


def _tensor(machine, storage, offset, shape, stride, *_):
    """torch._utils._rebuild_tensor_v2 without gradients and hooks."""
    place = _want(offset, int), _ints(shape), _ints(stride)
    return machine.tensor(_want(storage, Storage), *place, None)


def _tensor_v3(machine, storage, offset, shape, stride, grad, hooks, dtype, *_):
    place = _want(offset, int), _ints(shape), _ints(stride)
    return machine.tensor(_want(storage, Storage), *place, _dtype(_want(dtype, _Name)))


def _ints(values) -> tuple[int, ...]:
    return tuple(int(_want(v, int)) for v in _want(values, tuple))


def _scalar(_, dtype, data):
    """numpy's scalar, kept as a Python number."""
    return np.frombuffer(_encoded(data), _want(dtype, np.dtype), 1)[0].item()


def _encoded(data):
    return data.encode("latin1") if isinstance(data, str) else _want(data, bytes)


def _numbers(_, shape, dtype, fortran, data) -> np.ndarray:
    """numpy.ndarray.__setstate__, of plain numbers."""
    flat = np.frombuffer(_encoded(data), _want(dtype, np.dtype))
    return flat.reshape(_ints(shape), order="F" if fortran else "C")


def _frombuffer(_, data, dtype, shape, order) -> np.ndarray:
    """numpy's own builder of protocol 5, with the bytes in the pickle."""
    flat = np.frombuffer(_want(data, bytes | bytearray), _want(dtype, np.dtype))
    return flat.reshape(_ints(shape), order="F" if order == "F" else "C")


_NUMPY_CODES = frozenset("b1 i1 u1 i2 u2 f2 i4 u4 f4 i8 u8 f8".split())


def _numpy_dtype(_, code, *more):
    if _want(code, str) not in _NUMPY_CODES:
        raise ValueError(f"numpy dtype {code[:20]!r}")
    return np.dtype(code)


def _dict(machine, items=()):
    """collections.OrderedDict, of pairs; collections.Counter, of a dict."""
    if isinstance(items, dict):
        return dict(items)
    return {machine.key(key): value for key, value in _want(items, list | tuple)}


def _set(machine, items=()):
    return set(map(machine.key, _want(items, list | tuple)))


def _path(_, *parts):
    """A path as text; its first part may be the root."""
    return str(pathlib.PurePosixPath(*(_want(p, str) for p in parts)))


def _device(_, *name):
    return ":".join(str(_want(n, str | int)) for n in name)


def _first(_, tensor, *more):
    return tensor


_UNTYPED = "torch.storage.UntypedStorage"
_BUILDERS: dict[str, Callable] = {  # Of the machine and what the program gives.
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": _dict,
    "argparse.Namespace": lambda _: _Plain(),
    "builtins.bytes": lambda _: b"",  # Others are written as texts.
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.slice": lambda _, *items: items,
    "pathlib.PosixPath": _path,
    "pathlib._local.PosixPath": _path,
    "torch.Size": lambda _, items=(): tuple(_want(items, list | tuple)),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    _UNTYPED: lambda *_: None,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.ndarray": lambda *_: None,
    "_codecs.encode": lambda _, text, *codec: _encoded(text),
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
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

    def plain(self, value, depth=0):
        """Return a copy."""
        self.count += 1
        if self.count > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS} objects")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested too deeply, more than {MAX_DEPTH} times")
        if isinstance(value, dict):
            # Not str(key): a name among the keys is a text already.
            return {key: self.plain(v, depth + 1) for key, v in value.items()}
        if isinstance(value, list):
            return [self.plain(v, depth + 1) for v in value]
        if type(value) is tuple:
            return tuple(self.plain(v, depth + 1) for v in value)
        if isinstance(value, _Array):
            return value.value
        return str(value) if isinstance(value, _Name) else value
