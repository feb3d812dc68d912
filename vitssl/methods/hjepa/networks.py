"""The networks of H-JEPA with their parameters put in, for one forward pass."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from vitssl.methods.hjepa.levels import Members


@dataclasses.dataclass
class Networks:
    """The modules with their parameters put in, for one step.

    `stats` (running statistics of batch normalisation) changes as levels are computed;
    nothing else does.

    Attributes:
        encoder, predictor, levels: modules.
        params: {"encoder", "predictor", "levels"}.
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
    calls: int = 0

    def _rngs(self):
        """Return a key of its own for every call."""
        if self.rng is None:
            return {}
        self.calls += 1
        return {"drop_path": jax.random.fold_in(self.rng, self.calls)}

    def encode(self, image, **masks):
        """Return (class token [B, D] or None, patch tokens [B, K, D])."""
        tokens, _ = self.encoder.apply(
            {"params": self.params["encoder"]},
            image,
            train=self.train,
            rngs=self._rngs(),
            **masks,
        )
        return split(self.encoder, tokens)

    def encode_target(self, image):
        """Return the patch tokens [B, N, D] that are to be predicted.

        The target encoder never drops paths; without one, the encoder takes its place
        as it is, gradients included.
        """
        tokens, _ = self.encoder.apply(
            {"params": self.target},
            image,
            train=self.train and not self.detach,
            rngs={} if self.detach else self._rngs(),
        )
        tokens = split(self.encoder, tokens)[1]
        return jax.lax.stop_gradient(tokens) if self.detach else tokens

    def positions(self, grid):
        """Return the encoder's position table of a grid: [N, D]."""
        return self.encoder.apply(
            {"params": self.params["encoder"]}, grid, method="position_table"
        )

    def predict(self, *args, **kwargs):
        """Return the predictor's output; see `predictor.Predictor`."""
        return self.predictor.apply(
            {"params": self.params["predictor"]},
            *args,
            train=self.train,
            rngs=self._rngs(),
            **kwargs,
        )

    def project(self, x, members: Members, only=None, *, target=False):
        """Return {level: (features [B, n, D], valid [B, n])}; see `levels.Levels`."""
        return self._levels(target, x, members, only=only)

    def coarse(self, x, *, target=False):
        """Return the coarsest level of pooled features [..., D]."""
        return self._levels(target, x, method="coarse")

    def _levels(self, target, *args, **kwargs):
        params = self.target_levels if target else self.params["levels"]
        if target and self.detach:
            params = jax.lax.stop_gradient(params)
        variables = {"params": params}
        if not self.stats:
            return self.levels.apply(variables, *args, train=self.train, **kwargs)
        out, moved = self.levels.apply(
            variables | {"batch_stats": self.stats},
            *args,
            train=self.train,
            mutable=["batch_stats"],
            **kwargs,
        )
        self.stats = moved["batch_stats"]
        return out


def split(encoder, tokens):
    """Return (class token [B, D] or None, patch tokens [B, N, D])."""
    cls = tokens[:, 0] if encoder.cls else None
    return cls, tokens[:, encoder.prefix :]
