"""The networks of H-JEPA with their parameters put in, for one forward pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vitssl.models import posemb


@dataclasses.dataclass
class Networks:
    """The modules with their parameters put in, for one step.

    `stats` (running statistics of batch normalisation) changes as levels are computed;
    nothing else does.

    Attributes:
        params: {"encoder", "predictor", "levels", "projector"}; the last two only if
            there are any.
        target: parameters of the target encoder; those of the encoder itself for
            training without one.
        target_levels: parameters of the levels on the target side.
        stats: "batch_stats" of the levels, {} if they have none.
        detach: no gradient into targets.
        train: drop paths and batch statistics.
        rng: key of the drop paths.
    """

    encoder: nn.Module
    predictor: nn.Module
    levels: nn.Module
    params: Any
    target: Any
    target_levels: Any
    stats: Any
    detach: bool = True
    train: bool = True
    rng: Any = None
    projector: nn.Module | None = None
    calls: int = 0

    def _rngs(self):
        """Return a key of its own for every call."""
        if self.rng is None:
            return {}
        self.calls += 1
        return {"drop_path": jax.random.fold_in(self.rng, self.calls)}

    def encode(self, image, **masks):
        """Return (class token [B, D] or None, patch tokens [B, K, D])."""
        weights = {"params": self.params["encoder"]}
        rngs = self._rngs()
        tokens, _ = self.encoder.apply(
            weights, image, train=self.train, rngs=rngs, **masks
        )
        return split(self.encoder, tokens)

    def encode_target(self, image):
        """Return the patch tokens [B, N, D] that are to be predicted.

        The target encoder never drops paths; without one, the encoder takes its place
        as it is, gradients included.
        """
        train, rngs = (False, {}) if self.detach else (self.train, self._rngs())
        tokens, _ = self.encoder.apply(
            {"params": self.target}, image, train=train, rngs=rngs
        )
        tokens = split(self.encoder, tokens)[1]
        return jax.lax.stop_gradient(tokens) if self.detach else tokens

    def positions(self, grid):
        """Return the position table of a grid that the predictor uses: [N, D]."""
        if self.predictor.positions == "sincos":
            width = self.predictor.width or self.encoder.width
            return jnp.asarray(posemb.sincos(grid, width))
        weights = {"params": self.params["encoder"]}
        return self.encoder.apply(weights, grid, method="position_table")

    def predict(self, *args, **kwargs):
        """Return the predictor's output; see `predictor.Predictor`."""
        weights, rngs = {"params": self.params["predictor"]}, self._rngs()
        return self.predictor.apply(
            weights, *args, train=self.train, rngs=rngs, **kwargs
        )

    def project_views(self, pooled):
        """Return what LeJEPA compares of pooled features [B, V, D]: [B, V, P]."""
        return self.projector.apply({"params": self.params["projector"]}, pooled)

    def project(self, *args, target=False, **kwargs):
        """Return what the levels make of features; see `levels.Levels`."""
        params = self.target_levels if target else self.params.get("levels", {})
        if target and self.detach:
            params = jax.lax.stop_gradient(params)
        kwargs |= {"train": self.train, "target": target}
        if not self.stats:
            return self.levels.apply({"params": params}, *args, **kwargs)
        variables = {"params": params, "batch_stats": self.stats}
        kwargs["mutable"] = ["batch_stats"]
        out, moved = self.levels.apply(variables, *args, **kwargs)
        self.stats = moved["batch_stats"]
        return out


def split(encoder, tokens):
    """Return (class token [B, D] or None, patch tokens [B, N, D])."""
    cls = tokens[:, 0] if encoder.cls else None
    return cls, tokens[:, encoder.prefix :]
