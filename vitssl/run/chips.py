"""Kinds of accelerators: the published figures of `accelerators/*.json`.

A file is one kind; another one beside them is another kind.
"""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
import re

from vitssl import errors

_FOLDER = pathlib.Path(__file__).parent / "accelerators"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the vendor publishes of a device.

    Attributes:
        name: of the product.
        matches: regular expression of what JAX calls it, in lower case.
        platform: "cuda" or "tpu".
        products: dense peaks in FLOP/s by what a product is made in: "bf16"; "tf32",
            float32 values at the default precision; "f32", at the highest.
        bandwidth: of the memory, bytes/s.
        memory: bytes.
        per_host: devices of a host; 0: all of them are on the fast links.
        link, network: bytes/s of a device to others of its host, and of other hosts, in
            one direction.
        capability: of NVIDIA's devices, (major, minor).
        target: of NVIDIA's devices: what XLA asks of one, by its own names.
        topologies: of TPUs: the slices there are.
    """

    name: str
    matches: str
    platform: str
    products: dict[str, float]
    bandwidth: float
    memory: int
    per_host: int
    link: float
    network: float
    capability: tuple[int, ...] = ()
    target: dict[str, float] = dataclasses.field(default_factory=dict)
    topologies: tuple[str, ...] = ()

    def shape(self, text: str | None) -> tuple[int, ...]:
        """Return the shape of so many devices: (hosts, devices of one), or of a slice.

        Args:
            text: "8", "4x4"; None = one device, or the smallest slice.

        Raises:
            UsageError: no machine has that shape.
        """
        if text is None:
            sides = ()
        elif re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", text):
            sides = tuple(map(int, text.split("x")))
        else:
            raise errors.UsageError(f"{text!r} is no number or shape, as 8 or 4x4 are")
        return self._slice(sides) if self.platform == "tpu" else self._hosts(sides)

    def _slice(self, sides):
        shapes = [tuple(map(int, t.split("x"))) for t in self.topologies]
        if not sides:
            return shapes[0]
        for shape in shapes:
            if shape == sides or (math.prod(shape),) == sides:
                return shape
        raise errors.UsageError(
            f"no such slice of {self.name}; there is {', '.join(self.topologies)}"
        )

    def _hosts(self, sides):
        hosts, here = (1, *sides)[-2:] if sides else (1, 1)
        most = self.per_host
        if len(sides) == 1 and here > most:
            hosts, rest = divmod(here, most)
            if rest:
                near = f"{hosts * most}, {(hosts + 1) * most}"
                raise errors.UsageError(
                    f"no whole hosts of {most} {self.name}; nearest: {near}"
                )
            here = most
        if len(sides) > 2 or here > most:
            raise errors.UsageError(
                f"{self.name} come as N, or as HOSTSxN with N up to {most}"
            )
        return hosts, here


@functools.cache
def known() -> dict[str, Kind]:
    """Return {short name: kind}."""
    found = {}
    for path in sorted(_FOLDER.glob("*.json")):
        values = json.loads(path.read_text())
        values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        found[path.stem] = Kind(**values)
    return found


def of_device(device_kind: str) -> Kind | None:
    """Return the kind of a device by what JAX calls it, or None."""
    for kind in known().values():
        if re.fullmatch(kind.matches, device_kind.lower()):
            return kind
    return None


def named(text: str) -> tuple[Kind, tuple[int, ...]]:
    """Return kind and shape of a text such as "h200", "h200:8" or "v5e:4x4".

    Raises:
        UsageError: there is no such kind, or none in that shape.
    """
    name, colon, shape = text.partition(":")
    if name not in known():
        near = difflib.get_close_matches(name, known(), 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known())}"
        raise errors.UsageError(f"--on={text}: no such kind of device; {hint}")
    kind = known()[name]
    try:
        return kind, kind.shape(shape if colon else None)
    except errors.UsageError as e:
        raise errors.UsageError(f"--on={text}: {e}") from None
