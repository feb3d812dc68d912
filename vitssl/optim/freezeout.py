"""FreezeOut: anneal every layer's rate to zero at its own time, then freeze it.

Everything is a closed form of the position in the run, so a resumed run needs no
state, and the trainer knows every freeze event before it happens. Positions are in
one unit throughout: optimizer steps in the trainer, micro-iterations where an
original is reproduced.

With r_i = f(t_0 + (1 - t_0) i / L), f the identity, the square or the cube, layer i
of 0..L trains for M_i = r_i (T - W) of the T - W iterations after the warm-up of W.
Layer L has r = 1 and never freezes.

Sources: Brock et al. 2017, arXiv:1706.04983, section 2; ajbrock/FreezeOut@73beea1;
utkutpcgl/ViTFreeze@30e80f9 ViT/util/freezeout_utils.py (warm-up, L = depth).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

import jax.numpy as jnp

from vitssl import errors, ranges, tree

POWERS = {"linear": 1, "squared": 2, "cubic": 3}
NEVER = -1  # Layer index of what never freezes.


@dataclasses.dataclass(frozen=True)
class Store:
    """Config section `freeze.store`: what a frozen prefix makes is kept.

    From a freeze event on the visible tokens behind the frozen blocks are kept for
    every view; training goes on from them, and the next event extends them. The task
    stays what it was: a view has its own mask, and hidden patches were never seen. That
    takes views that come back, so they are drawn once, from the first event on.

    Attributes:
        views: per image, visited in turn, one an epoch; 0 is off: views are new in
            every epoch, and the prefix is run in every step.
        tokens: "computed" visits the same views and runs the prefix before every step:
            the same run without a disk, what "stored" is measured against.
        fill: "background": the step that first visits a view runs the frozen blocks
            and keeps what they make, so nothing waits and nothing is run twice. "pass":
            all views are made at the event, with a line of progress, while training
            waits. The run is the same.
        dir: folder of the store; "" is WORKDIR/store. Its contents may be deleted: they
            are made again when needed.
        dtype: of stored tokens; "auto" is that of the computation, which loses
            nothing.
        disk_gb: most gigabytes (1e9 bytes) to fill; 0.0 is what the disk has.
        every: blocks behind which there may be a store: multiples of it. Each event
            that moves the store rewrites it, for the forward pass of what froze.
    """

    views: Annotated[int, ranges.Range(0, 1 << 20)] = 0
    tokens: Literal["stored", "computed"] = "stored"
    fill: Literal["background", "pass"] = "background"
    dir: str = ""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    disk_gb: ranges.NotNegative = 0.0
    every: ranges.Count = 1

    @property
    def on(self) -> bool:
        """Return whether tokens are stored."""
        return self.views > 0 and self.tokens == "stored"


@dataclasses.dataclass(frozen=True)
class FreezeOut:
    """Config section `freeze`; any method, any backbone.

    Attributes:
        schedule: how the ends of the layers are spread over the run; none is off.
        t_0: when layer 0 freezes, as a share of the run after the warm-up, before the
            power: cubic 0.8 is 0.8^3 = 51 % of it.
        layerwise_lr: every layer has a cosine of its own that ends when it freezes
            (and ignores optim.min_lr). False: all follow optim's schedule until they
            freeze.
        scale_lr: with layerwise_lr, layer i starts from lr / r_i, so that the area
            under every layer's curve is the same.
        warmup_to_layer_lr: ramp up to lr / r_i; otherwise the warm-up ends at lr and
            the rate jumps from there (as the original does).
        layers: ((pattern of parameter names, layer index), ...), first match wins; -1
            never freezes, and so does what no pattern matches. () takes the method's
            own table (`freeze_layers`).
        patch_embed: False: the patch embedding never freezes; the other layers then
            count from block 0.
        cls_token: whether the class token freezes with its layer. False is the
            original, which then needs activation gradients through all frozen blocks.
        grow_batch: images of a step from each event on at which layers freeze or are
            released, in their order; the last one stays. () keeps `batch_size`. Steps
            are as many as before, so a run that grows sees more images. The rate
            follows by optim.lr_batch and its power (0: it does not). An event begins an
            epoch of the data; epochs of schedules stay steps of `batch_size` images.
        grow_depth: ((share of the run, blocks from there on), ...): the encoder begins
            with the blocks of the first row, whose share is 0.0, and ends with all;
            new ones are copies of those below them. () has all from the start.
        store: see `Store`.
    """

    schedule: Literal["none", "linear", "squared", "cubic"] = "none"
    t_0: ranges.Share = 0.8
    layerwise_lr: bool = True
    scale_lr: bool = True
    warmup_to_layer_lr: bool = False
    layers: tuple[tuple[str, Annotated[int, ranges.Range(NEVER)]], ...] = ()
    patch_embed: bool = True
    cls_token: bool = True
    grow_batch: tuple[ranges.Count, ...] = ()
    grow_depth: tuple[tuple[ranges.BelowOne, ranges.Count], ...] = ()
    store: Store = Store()

    def check(self) -> Iterator[str]:
        """Yield what cannot be combined."""
        shares, depths = (
            [s for s, _ in self.grow_depth],
            [d for _, d in self.grow_depth],
        )
        if shares and (
            shares[0] or shares != sorted({*shares}) or depths != sorted({*depths})
        ):
            yield (
                f"grow_depth={self.grow_depth}: ((0.0, blocks), (share, more blocks), "
                "...), both rising"
            )
        if self.warmup_to_layer_lr and not (self.layerwise_lr and self.scale_lr):
            yield "warmup_to_layer_lr=True: needs layerwise_lr=True and scale_lr=True"

    def index(self, found: dict[str, int]) -> dict[str, int]:
        """Apply `patch_embed` and `cls_token` to the layers {name: index} of leaves."""
        layers = {}
        for name, layer in found.items():
            if not self.patch_embed:
                bare = re.search(r"(^|/)patch_embed/", name) or layer == 0
                layer = NEVER if bare else max(layer - 1, NEVER)
            if not self.cls_token and name.rsplit("/", 1)[-1] == "cls":
                layer = NEVER
            layers[name] = layer
        return layers

    def table(self, names, wish: str) -> dict[str, int]:
        """Return {name: layer} of leaves by the table `layers`.

        Raises:
            UsageError: there is none; `wish` is the key that needs it.
        """
        if not self.layers:
            raise errors.UsageError(
                f"{wish}: this method has no table of its own; give "
                "freeze.layers=((pattern, layer), ...), for a ViT "
                "freezeout.vit_layers(depth, prefix)"
            )
        return tree.match(names, self.layers, what="freeze.layers", default=NEVER)

    def plan(self, names, total: int, warmup: int) -> tuple[dict, "Schedule"]:
        """Return ({name: layer}, schedule) of leaves, for a run of `total` steps."""
        layers = self.index(self.table(names, f"freeze.schedule={self.schedule}"))
        last = max(layers.values())
        if last < 1:
            raise errors.UsageError(
                f"freeze.layers: the largest index is {last}; FreezeOut needs two "
                "layers or more"
            )
        return layers, Schedule(self, last, total, warmup)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When each layer freezes, and its rate until then.

    Attributes:
        spec: the config section.
        last: index L of the last layer.
        total, warmup: iterations of the run and of its warm-up.
    """

    spec: FreezeOut
    last: int
    total: int
    warmup: int

    def ratio(self, layer: int) -> float:
        """Return r_i, the share of the run after the warm-up that a layer trains."""
        return ratio(self.spec.schedule, self.spec.t_0, layer, self.last)

    def span(self, layer: int) -> float:
        """Return M_i, in iterations after the warm-up."""
        return (self.total - self.warmup) * self.ratio(layer)

    def frozen_from(self, layer: int) -> int | None:
        """Return the first iteration at which a layer is frozen; None = never.

        The test is j > M_i, strictly, with j counted from the end of the warm-up.
        """
        first = self.warmup + math.floor(self.span(layer)) + 1
        frozen = layer != NEVER and self.ratio(layer) < 1 and first < self.total
        return first if frozen else None

    def lr(self, layer: int, at, peak, flat):
        """Return the rate of a layer (or NEVER) at an iteration, int or traced.

        Args:
            peak: rate at the end of the warm-up.
            flat: the common schedule at that iteration; it is the rate during the
                warm-up, of layers that never freeze, and without layerwise_lr.
        """
        if layer == NEVER or not self.spec.layerwise_lr:
            return flat
        r = self.ratio(layer)
        scale = 1.0 / r if self.spec.scale_lr else 1.0
        x = jnp.clip((at - self.warmup) / self.span(layer), 0.0, 1.0)
        own = 0.5 * (peak * scale) * (1 + jnp.cos(jnp.pi * x))
        rise = flat * scale if self.spec.warmup_to_layer_lr else flat
        return jnp.where(at < self.warmup, rise, own)


def ratio(schedule: str, t_0: float, layer: int, last: int) -> float:
    """Return r_i = f(t_0 + (1 - t_0) i / L)."""
    return (t_0 + (1 - t_0) * layer / last) ** POWERS[schedule]


def vit_layers(
    depth: int, prefix: str = "", more: tuple = (), tokens: bool = True
) -> tuple:
    """Return `FreezeOut.layers` of a ViT: patch embedding 0, block i layer i + 1.

    The class token, the registers and a trained position table go with block 0: they
    act through it alone.

    The last layer, which never freezes, is `depth`.

    Args:
        prefix: of the ViT's parameters, "encoder/".
        more: further ((pattern, index), ...), tried first: heads that end with a block.
        tokens: False for a ViT that has neither tokens of its own nor a trained table.
    """
    blocks = tuple((rf"{prefix}block_{i}/.*", i + 1) for i in range(depth))
    start = ((rf"{prefix}patch_embed/.*", 0),)
    own = ((rf"{prefix}(cls|registers|pos_embed)", 1),) if tokens else ()
    return (*more, *start, *own, *blocks)


def hvit_layers(depths: tuple[int, ...], prefix: str = "") -> tuple:
    """Return `FreezeOut.layers` of a hierarchical ViT; see `vit_layers`.

    Blocks count through all stages, of both streams; patch merging goes with the block
    before it. What joins the streams, and the last norms, never freeze.
    """
    stream, depth = f"{prefix}(spectral/)?", sum(depths)
    merges = tuple(
        (rf"{stream}merge_{s}/.*", sum(depths[: s + 1])) for s in range(len(depths) - 1)
    )
    last = ((rf"{stream}norm/.*", depth), (rf"{stream}patch_norm/.*", 0))
    return vit_layers(depth, stream, (*last, *merges))


def decayed(decay: float, layers: dict[str, int]) -> dict[str, float]:
    """Return {name: decay ** (top - layer)} of the layers {name: index} of leaves.

    They are FreezeOut's, but for what is in no block: tokens and position tables are
    embeddings, layer 0; the last norm belongs to the head, as what never freezes does,
    and both keep their rate.

    Source: Bao et al. 2022 (BEiT), arXiv:2106.08254; MAE util/lr_decay.py.
    """
    last = max(layers.values())
    top, factors = last + 1, {}
    for name, layer in layers.items():
        if layer == NEVER or (layer == last and re.search(r"(^|/)norm/\w+$", name)):
            layer = top
        elif re.search(r"(^|/)(cls|registers|pos_embed|encodings/.*)$", name):
            layer = 0
        factors[name] = decay ** (top - layer)
    return factors
