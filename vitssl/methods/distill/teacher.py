"""The network that a student imitates: a run of ours or weights of others, frozen."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax

from vitssl import errors
from vitssl.convert import backbone
from vitssl.models import patches

UNTRAINED = "untrained"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Config section `teacher`.

    Attributes:
        from_: key `from`: WORKDIR, WORKDIR@best or WORKDIR@STEP of a run, or weights
            that `vitssl convert import` wrote (DINOv2, DINOv3, timm, ...). "untrained"
            is a random network of the student's kind: what a trained one must beat, and
            what needs no files.
        part: of a run: which encoder, see `opened.Past.encoder`; "" = what its
            evaluations use.
        pool: its feature of an image; "" = what its family uses.
    """

    from_: str = ""
    part: Literal["", "target", "encoder", "ema"] = ""
    pool: Literal["", "cls", "mean"] = ""

    def check(self) -> Iterator[str]:
        """Yield what is missing."""
        if not self.from_:
            yield (
                "from: empty; give the workdir of a run, or what `vitssl convert "
                f"import` wrote ({UNTRAINED} is a random network)"
            )

    def open(self, run) -> backbone.Backbone:
        """Return the teacher's weights.

        Args:
            run: `base.Run`.

        Raises:
            CheckpointError: nothing there, or no encoder in it.
            UsageError: it reads images of other channels than the data's.
        """
        found = run.weights(self.from_, self.part)
        found.encode(self.pool)  # What it is comes before what it reads.
        if found.channels != run.channels:
            raise errors.UsageError(
                f"teacher.from={self.from_}: reads {found.channels} channel(s), "
                f"data.channels={run.channels}; a source gives grey images as colours "
                f"with data.channels={found.channels} and data.mean, data.std to match"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Network:
    """What a teacher makes of crops, in the precision of the run.

    Attributes:
        encode: see `backbone.Encode`.
        like: shapes of its variables; None where they are drawn.
    """

    encode: backbone.Encode
    like: Any = None

    @classmethod
    def of(cls, found: backbone.Backbone, pool: str, dtype: str) -> "Network":
        """Return the network of weights."""
        encode, variables = found.encode(pool), found.variables()
        if hasattr(encode.module, "dtype"):
            module = encode.module.clone(dtype=dtype)
            encode = dataclasses.replace(encode, module=module)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        return cls(encode, like)

    def side(self, side: int) -> int:
        """Return at what side, in pixels, crops of a side are seen: the nearest."""
        patch = getattr(self.encode.module, "patch", 1)
        if not list(self.encode.module.check_image(side)):
            return side
        return max(1, round(side / patch)) * patch

    def __call__(self, variables, image) -> dict:
        """Return {"pooled": [B, D], "tokens": [B, N, D]} of crops uint8 [B, S, S, C].

        Crops that its patch does not divide are resized.
        """
        mean, std = self.encode.mean, self.encode.std
        seen = self.side(image.shape[1])
        if seen != image.shape[1]:
            image = patches.normalise(image, mean, std)
            shape = (len(image), seen, seen, image.shape[-1])
            image = jax.image.resize(image, shape, "linear")
        return self.encode(variables, image)
