"""OlmoEarth's masking strategies."""

import numpy as np

from tests.golden import reading
from vitssl.data import modalities, states
from vitssl.methods.latent_mim import bandsets
from vitssl.methods.latent_mim import masks as field_masks

# Names of the original's options.
NAMES = {
    "allow_encoding_decoding_same_bandset": "same_bandset",
    "only_decode_modalities": "decode_only",
    "min_encoded_bandsets": "min_encoded",
    "max_encoded_bandsets": "max_encoded",
    "min_decoded_bandsets": "min_decoded",
    "max_decoded_bandsets": "max_decoded",
    "min_encode_ratio": "min_encode",
    "max_encode_ratio": "max_encode",
    "min_decode_ratio": "min_decode",
    "max_decode_ratio": "max_decode",
    "initial_encode_ratio": "encode_ratio",
    "initial_decode_ratio": "decode_ratio",
    "final_encode_ratio": "final_encode",
    "final_decode_ratio": "final_decode",
    "decodable_modalities": "decodable",
    "decoded_modalities": "decodable",
    "fully_mask_modalities": "hidden",
    "randomize_missing_modalities": "hidden",
    "max_to_mask": "max_chosen",
}
DEFAULTS = {"same_bandset": False, "decode_only": ()}  # The original's.


# One coin serves a whole batch of the original: all its samples are of one kind.
BY_COIN = (
    *("space_time", "random_space", "modality_space_time"),
    *("modality_cross_space_time", "random_time_with_decode"),
)
FRACTIONS = "fractions_[ONLINE,TARGET_ONLY,DECODER,MISSING]"


def strategy(given) -> field_masks.Strategy:
    """Return our strategy of the original's options; no bound is our 0, its None."""
    options = {}
    for key, value in given.items():
        if value is None and not key.startswith(("min_", "max_")):
            continue
        value = tuple(value) if isinstance(value, list) else value
        options[NAMES.get(key, key)] = 0 if value is None else value
    return field_masks.Strategy(**DEFAULTS | options)


def _statistics(case):
    for one in case.config:
        made = strategy(one["strategy"])
        coins = (None, 0.1, 0.5, 0.9) if made.type in BY_COIN else (None,)
        faults = [_fault(one, made, coin) for coin in coins]
        assert not all(faults), f"{made}: {faults[0]}"


def _drawn(one, made, coin):
    """{modality: [B, 4] fractions of our states}; each sample its own coin if None."""
    kinds = [modalities.find(name) for name in one["modalities"]]
    side, patch = one["hw_p"], one["patch_size"]
    found = {k.name: [] for k in kinds}
    for i in range(one["B"]):
        rng = np.random.default_rng(i)
        # A whole sample, with pixels and patches, as the reader hands it on.
        gone = {
            k.name: states.per_patch(
                k,
                states.missing(k, np.zeros(k.shape(side * patch, one["T"]))),
                patch,
            )
            for k in kinds
        }
        own = rng.random() if coin is None else coin
        masks = field_masks.draw(made, kinds, gone, rng, coin=own)
        for name, mask in masks.items():
            found[name].append([(mask == state).mean() for state in range(4)])
    return {name: np.array(rows) for name, rows in found.items()}


def _fault(one, made, coin):
    """Which modality, and what of it, is not as measured; "" if all are."""
    drawn, shape = _drawn(one, made, coin), (one["hw_p"], one["T"])
    for name, want in one[FRACTIONS].items():
        got = drawn[name]
        reading.agree(
            want,
            tokens_per_sample=int(np.prod(modalities.find(name).tokens(*shape))),
            constant_within_patch=True,  # Ours are masks of patches.
        )
        # Both means are of a sample of draws.
        std = np.maximum(want["std"], got.std(0))
        slack = 1e-6 + (0.1 if max(want["std"]) > 0 else 0.0)
        limits = {
            "mean": 4 * np.sqrt(2) * std / np.sqrt(one["B"]) + 1e-6,
            "std": 0.05,
        }
        for what, limit in limits.items():
            if (abs(getattr(got, what)(0) - want[what]) > limit).any():
                return f"{what} of {name}"
        if (got.min(0) < np.array(want["min"]) - slack).any():
            return f"min of {name}"
        if (got.max(0) > np.array(want["max"]) + slack).any():
            return f"max of {name}"
    return ""


def _rules(case):
    c = case.config
    kinds = [modalities.find(name) for name in c["modalities"]]
    reading.agree(c, missing_value=modalities.MISSING)
    missing = {k.name: states.missing(k, case.inputs[k.name]) for k in kinds}
    filled = {}
    for name, gone in missing.items():
        filled[name] = np.where(gone, states.MISSING, case.inputs[f"base_mask/{name}"])
        case.close(f"missing_mask/{name}", gone)
        # The original fills a mask in which everything else is predicted.
        case.close(f"filled/{name}", np.where(gone, states.MISSING, states.DECODER))
    steps = states.present_times(kinds, missing)
    case.close("timesteps_with_at_least_one_modality", steps)
    only = tuple(c["only_decode_modalities"])
    rows = {"ruled": [], "strict": []}
    for i, selection in enumerate(c["selections"]):
        mine = {name: mask[i] for name, mask in filled.items()}
        there = bandsets.present(mine, only)
        assert {tuple(b) for b in c["present"][i]} == set(there)
        encoded, decoded = (
            {tuple(b) for b in selection[k]} for k in ("encoded", "decoded")
        )
        for how in rows:
            rows[how].append(
                {
                    name: bandsets.apply_rules(
                        name, mask, there, encoded, decoded, strict=how == "strict"
                    )
                    for name, mask in mine.items()
                }
            )
    for how, masks in rows.items():
        for kind in kinds:
            stacked = np.stack([m[kind.name] for m in masks])
            case.close(f"{how}_mask/{kind.name}", stacked)


CHECKS = {
    "masking strategies (statistics)": _statistics,
    "missing masks + bandset rules": _rules,
}
