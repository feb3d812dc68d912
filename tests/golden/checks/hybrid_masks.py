"""OlmoEarth's masking strategies."""

import numpy as np

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


def strategy(given) -> field_masks.Strategy:
    """Return our strategy of the original's options."""
    options = {NAMES.get(k, k): v for k, v in given.items() if v is not None}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return field_masks.Strategy(**DEFAULTS | options)


def _statistics(case):
    for one in case.config:
        _one(one)


def _one(one):
    kinds = [modalities.find(name) for name in one["modalities"]]
    count, side, patch = one["B"], one["hw_p"], one["patch_size"]
    made = strategy(one["strategy"])
    found = {k.name: [] for k in kinds}
    for i in range(count):
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
        masks = field_masks.draw(made, kinds, gone, rng, coin=rng.random())
        for name, mask in masks.items():
            found[name].append([(mask == state).mean() for state in range(4)])
    for name, want in one["fractions_[ONLINE,TARGET_ONLY,DECODER,MISSING]"].items():
        got = np.array(found[name])
        kind = modalities.find(name)
        assert want["tokens_per_sample"] == np.prod(kind.tokens(side, one["T"]))
        # Both means are of a sample of draws.
        std = np.maximum(want["std"], got.std(0))
        limit = 4 * np.sqrt(2) * std / np.sqrt(count) + 1e-6
        label = f"{one['strategy']} {name}"
        assert (abs(got.mean(0) - want["mean"]) <= limit).all(), label
        slack = 1e-6 + (0.1 if max(want["std"]) > 0 else 0.0)
        assert (got.min(0) >= np.array(want["min"]) - slack).all(), label
        assert (got.max(0) <= np.array(want["max"]) + slack).all(), label
        assert abs(got.std(0) - want["std"]).max() <= 0.05, label


def _rules(case):
    c = case.config
    kinds = [modalities.find(name) for name in c["modalities"]]
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
