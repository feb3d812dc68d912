"""What becomes of each token of a multi-sensor sample: read, predicted, or neither.

A strategy draws a mask of `data.states` for each modality; what is missing in the data
stays missing.

Sources: OlmoEarth, arXiv:2511.13655; allenai/olmoearth_pretrain@5411573
olmoearth_pretrain/train/masking.py, and @0a8852ed for the strategies `*_with_decode`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from vitssl import ranges
from vitssl.data import modalities
from vitssl.data.modalities import Modality
from vitssl.data.states import (
    DECODER,
    MISSING,
    ONLINE,
    TARGET_ONLY,
    Masks,
    present_times,
    scatter,
)
from vitssl.methods.latent_mim import bandsets

Type = Literal[
    "random",
    "space",
    "time",
    "space_time",
    "random_space",
    "modality",
    "modality_space_time",
    "modality_cross_random",
    "modality_cross_space",
    "modality_cross_time",
    "modality_cross_space_time",
    "random_increasing",
    "random_range",
    "selectable_modality",
    "selectable_random_range_modality",
    "random_fixed_modality",
    "random_with_decode",
    "random_time_with_decode",
]
LEAST_TIMES = 3  # Fewer steps than this are not masked as whole steps.


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Config section `mask`.

    Attributes:
        type: "random": tokens of a modality; "space": patches, the same in all; "time":
            whole steps; "space_time", "random_space", "modality_space_time": one of
            them per batch; "modality": whole modalities; "modality_cross_*": a base,
            then bandsets to read and to predict; "random_increasing": ratios that move
            with the step; "random_range": ratios of their own in each sample and
            modality; "selectable_*": some modalities are hidden or predicted whole;
            "random_fixed_modality": the same ones are always predicted;
            "random_with_decode", "random_time_with_decode": bandsets are read or
            predicted, never both.
        encode_ratio, decode_ratio: shares of tokens that are read and predicted.
        same_bandset: a bandset may be both.
        min_encoded, max_encoded: bandsets read; 0 = no bound.
        min_decoded, max_decoded: bandsets predicted; 0 = no bound.
        decode_only: modalities that are never read.
        strict_bandset_rules: a bandset that is neither read nor predicted has no
            predicted tokens. The original leaves those it has (False).
        min_encode, max_encode: range of "random_range"; the rest is predicted.
        min_decode, max_decode: its range of predicted tokens, 0 and 0 = the rest.
        final_encode, final_decode, steps: where and when "random_increasing" ends.
        decodable, hidden: modalities that "selectable_*" may predict whole or hide;
            "random_fixed_modality" predicts the first and may hide the second.
        max_chosen: most of them at a time.
        whole_patch: a patch with any missing pixel is missing; False asks the pixel
            in its top left corner alone, as the original does.
    """

    type: Type = "modality_cross_random"
    encode_ratio: ranges.Share = 0.5
    decode_ratio: ranges.Share = 0.5
    same_bandset: bool = True
    min_encoded: ranges.OrNone = 2
    max_encoded: ranges.OrNone = 0
    min_decoded: ranges.OrNone = 0
    max_decoded: ranges.OrNone = 0
    decode_only: tuple[str, ...] = modalities.MAPS
    strict_bandset_rules: bool = False
    min_encode: ranges.Probability = 0.1
    max_encode: ranges.Probability = 0.5
    min_decode: ranges.Probability = 0.0
    max_decode: ranges.Probability = 0.0
    final_encode: ranges.Probability = 0.1
    final_decode: ranges.Probability = 0.9
    steps: int = 1000
    decodable: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    max_chosen: ranges.OrNone = 1
    whole_patch: bool = True

    def check(self) -> Iterator[str]:
        """Yield what the keys do not agree on."""
        for name in ("encode", "decode"):
            low, high = (getattr(self, f"{end}_{name}") for end in ("min", "max"))
            if low > high:
                yield f"min_{name}={low}, max_{name}={high}: min <= max"
        if self.encode_ratio + self.decode_ratio > 1 + 1e-9:
            yield (
                f"encode_ratio={self.encode_ratio} and decode_ratio="
                f"{self.decode_ratio}: together at most 1"
            )
        for name in (*self.decode_only, *self.decodable, *self.hidden):
            if name not in modalities.MODALITIES:
                known = ", ".join(modalities.MODALITIES)
                yield f"decode_only, decodable, hidden: {name!r}: one of {known}"
        if self.type.startswith("selectable") and not (self.decodable or self.hidden):
            yield f"type={self.type}: set decodable or hidden"
        if self.type == "random_fixed_modality" and not self.decodable:
            yield f"type={self.type}: set decodable"

    def ratios(self, step: int) -> tuple[float, float]:
        """Return (encode, decode) at a step."""
        if self.type != "random_increasing":
            return self.encode_ratio, self.decode_ratio
        if step + 1 >= self.steps:
            return self.final_encode, self.final_decode
        along = (step + 1) / self.steps
        start = np.array([self.encode_ratio, self.decode_ratio])
        end = np.array([self.final_encode, self.final_decode])
        return tuple((start + (end - start) * along).tolist())


def draw(
    strategy: Strategy,
    kinds: Sequence[Modality],
    gone: Masks,
    rng: np.random.Generator,
    *,
    coin: float = 0.0,
    step: int = 0,
) -> Masks:
    """Return the masks of one sample.

    Args:
        gone: {modality: bool, the shape of its tokens}: what is missing.
        coin: number in [0, 1) that all samples of a batch share.
        step: of the run, for "random_increasing".
    """
    made = _Draw(strategy, list(kinds), gone, rng, coin, strategy.ratios(step))
    masks = getattr(made, strategy.type)()
    return {name: made.filled(name, mask) for name, mask in masks.items()}


@dataclasses.dataclass
class _Draw:
    """One drawing: the strategies are its methods, named like `Strategy.type`."""

    s: Strategy
    kinds: list[Modality]
    gone: Masks
    rng: np.random.Generator
    coin: float
    ratios: tuple[float, float]

    def filled(self, name, mask):
        """Return a mask with what is missing in the data."""
        return np.where(self.gone[name], MISSING, mask).astype(np.int8)

    def _enough_times(self):
        return len(present_times(self.kinds, self.gone)) >= LEAST_TIMES

    # Plain strategies.

    def _tokens(self, kind, ratios=None):
        """Return random tokens of one modality, in exact numbers."""
        shape = self.gone[kind.name].shape
        ratios = ratios or self.ratios
        if kind.space or kind.time:
            return scatter(self.rng, math.prod(shape), ratios).reshape(shape)
        # Too few tokens for shares of them: each is drawn by itself.
        u = self.rng.random(shape)
        rest = np.where(u < sum(ratios), DECODER, TARGET_ONLY)
        return np.where(u < ratios[0], ONLINE, rest)

    def random(self) -> Masks:
        return {kind.name: self._tokens(kind) for kind in self.kinds}

    random_increasing = random

    def space(self) -> Masks:
        grid = next(self.gone[k.name].shape[:2] for k in self.kinds if k.space)
        patches = scatter(self.rng, math.prod(grid), self.ratios).reshape(grid)
        return self._spread(patches[..., None, None], lambda kind: kind.space)

    def _spread(self, states, member):
        """Return `states` in all that is a member, and random tokens elsewhere."""
        return {
            k.name: np.broadcast_to(states, self.gone[k.name].shape)
            if member(k)
            else self._tokens(k)
            for k in self.kinds
        }

    def time(self) -> Masks:
        steps = present_times(self.kinds, self.gone)
        if len(steps) < LEAST_TIMES:
            return self.random()
        times = next(self.gone[k.name].shape[-2] for k in self.kinds if k.time)
        line = np.full(times, TARGET_ONLY)
        line[steps] = scatter(self.rng, len(steps), self.ratios, least=1)
        return self._spread(line[:, None], lambda kind: kind.time)

    def space_time(self) -> Masks:
        if self.coin < 0.5 or not self._enough_times():
            return self.space()
        return self.time()

    def random_space(self) -> Masks:
        return self.space() if self.coin < 0.5 else self.random()

    def modality(self) -> Masks:
        states = scatter(self.rng, len(self.kinds), self.ratios, least=1)
        return {
            k.name: np.full(self.gone[k.name].shape, state)
            for k, state in zip(self.kinds, states, strict=True)
        }

    def modality_space_time(self) -> Masks:
        choices = [self.space]
        choices += [self.time] * self._enough_times()
        choices += [self.modality] * (len(self.kinds) > 1)
        return choices[int(self.coin * len(choices))]()

    def random_range(self) -> Masks:
        s, masks = self.s, {}
        for kind in self.kinds:
            encode = self.rng.uniform(s.min_encode, s.max_encode)
            decode = 1 - encode
            if s.max_decode:
                decode = self.rng.uniform(s.min_decode, s.max_decode)
            masks[kind.name] = self._tokens(kind, (encode, decode))
        return masks

    # Whole modalities.

    def selectable_modality(self) -> Masks:
        return self._selected(self.random())

    def selectable_random_range_modality(self) -> Masks:
        return self._selected(self.random_range())

    def _selected(self, masks):
        s, names = self.s, [*self.s.decodable, *self.s.hidden]
        count = int(self.rng.integers(s.max_chosen + 1))
        for i in self.rng.permutation(len(names))[:count]:
            state = DECODER if i < len(s.decodable) else MISSING
            if names[i] in masks:
                masks[names[i]] = np.full_like(masks[names[i]], state)
        return masks

    def random_fixed_modality(self) -> Masks:
        masks = self.random()
        for name in self.s.decodable:
            if name in masks:
                masks[name] = np.full_like(masks[name], DECODER)
        # One that is there everywhere remains, or a place may have nothing at all.
        there = [n for n in self.s.hidden if n in masks and not self.gone[n].any()]
        if len(there) > 1:
            count = int(self.rng.integers(len(there)))
            for i in self.rng.permutation(len(there))[:count]:
                masks[there[i]] = np.full_like(masks[there[i]], MISSING)
        return masks

    # A base, then bandsets.

    def modality_cross_random(self) -> Masks:
        return self._cross(self.random(), lambda kind: False)

    def modality_cross_space(self) -> Masks:
        return self._cross(self.space(), lambda kind: not kind.space)

    def modality_cross_time(self) -> Masks:
        # Without enough steps the base is random, and nothing has to follow it.
        if not self._enough_times():
            return self.modality_cross_random()
        return self._cross(self.time(), lambda kind: not kind.time)

    def modality_cross_space_time(self) -> Masks:
        if self.coin < 0.5 or not self._enough_times():
            return self.modality_cross_space()
        return self.modality_cross_time()

    def _cross(self, masks, whole):
        masks = {name: self.filled(name, mask) for name, mask in masks.items()}
        s = self.s
        there = bandsets.present(masks, s.decode_only)
        encoded, decoded = bandsets.choose(
            there,
            self.rng,
            decode_only=s.decode_only,
            same=s.same_bandset,
            encoded=(s.min_encoded, s.max_encoded),
            decoded=(s.min_decoded, s.max_decoded),
        )
        for kind in self.kinds:
            masks[kind.name] = bandsets.apply_rules(
                kind.name,
                masks[kind.name],
                there,
                encoded,
                decoded,
                strict=s.strict_bandset_rules,
                whole=whole(kind),
            )
            if kind.name in s.decode_only:
                mask = masks[kind.name]
                mask[mask == ONLINE] = TARGET_ONLY
        used = (ONLINE, DECODER)
        if all(any((m == u).any() for m in masks.values()) for u in used):
            return masks
        return self._refilled(masks)

    def _refilled(self, masks):
        """Return random tokens where nothing would be read, or nothing predicted."""
        for kind in self.kinds:
            if kind.name in self.s.decode_only:
                continue
            mask = masks[kind.name]
            held = mask != MISSING
            count = int(held.sum())
            states = scatter(self.rng, count, self.ratios)
            if count == 1:
                states[:] = ONLINE
            mask[held] = states
        return masks

    # Bandsets that are read or predicted, never both.

    def random_with_decode(self) -> Masks:
        return self._split(lambda kind: self._tokens)

    def random_time_with_decode(self) -> Masks:
        if self.coin < 0.5 or not self._enough_times():
            return self.random_with_decode()
        line = self.time()
        return self._split(lambda kind: lambda k, _: line[k.name].copy())

    def _split(self, base):
        """Share out the bandsets; `base(kind)` masks one that has both parts."""
        encode, decode = self.ratios
        masks, sets = {}, []
        for kind in self.kinds:
            only = kind.name in self.s.decode_only
            masks[kind.name] = np.full(
                self.gone[kind.name].shape, DECODER if only else TARGET_ONLY
            )
            if not only:
                sets += [
                    (kind, i)
                    for i in range(len(kind.bandsets))
                    if not self.gone[kind.name][..., i].all()
                ]
        read = self.rng.permutation(len(sets))[: math.ceil(encode * len(sets))]
        for j, (kind, i) in enumerate(sets):
            state, share = (ONLINE, encode) if j in read else (DECODER, decode)
            ratios = (share, 0.0) if j in read else (0.0, share)
            drawn = base(kind)(kind, ratios)[..., i]
            masks[kind.name][..., i] = np.where(drawn == state, state, TARGET_ONLY)
        return masks


def bounds(
    strategy: Strategy, kinds: Sequence[Modality], shape
) -> tuple[int, dict[str, int] | None]:
    """Return the most tokens of a sample that are read, and predicted by modality.

    `shape` is the batch's `shapes.Shape`. (0, None): the strategy knows no bounds.
    """
    if strategy.type not in ("modality_cross_random", "random"):
        return 0, None
    only = strategy.decode_only if strategy.type != "random" else ()
    read, predicted = 0, {}
    for k in kinds:
        n = math.prod(k.tokens(shape.side, shape.times))
        few = not (k.space or k.time)  # Each token is drawn by itself.
        # One token that is left alone is read, whatever the share says.
        if k.name not in only:
            read += n if few else max(1, int(n * strategy.encode_ratio))
        predicted[k.name] = n if few else max(1, int(n * strategy.decode_ratio))
    return read, predicted
