"""Which bandsets of a sample are read, which are predicted, and what follows.

Source: allenai/olmoearth_pretrain@5411573 olmoearth_pretrain/train/masking.py
(ModalityCrossMaskingStrategy).
"""

import numpy as np

from vitssl.data.states import DECODER, MISSING, ONLINE, TARGET_ONLY, Masks

Bandset = tuple[str, int]  # Modality, number.


def present(masks: Masks, decode_only=()) -> list[Bandset]:
    """Return the bandsets that a choice can be made among.

    Those with a token that is read; of a modality that is never read, those with
    anything.
    """
    found = []
    for name, mask in masks.items():
        for i in range(mask.shape[-1]):
            one = mask[..., i]
            only = name in decode_only
            if (one != MISSING).any() if only else (one == ONLINE).any():
                found.append((name, i))
    return found


def choose(
    there: list[Bandset],
    rng,
    *,
    decode_only=(),
    same: bool = True,
    encoded: tuple[int, int] = (0, 0),
    decoded: tuple[int, int] = (0, 0),
) -> tuple[set, set]:
    """Return the bandsets that are read and that are predicted.

    One alone is read, none predicted; of two, one is read and the other predicted.

    Args:
        there: of `present`.
        decode_only: modalities that are never read.
        same: whether a bandset may be read and predicted.
        encoded, decoded: (least, most) that are read and predicted; 0 = no bound.
    """
    readable = [b for b in there if b[0] not in decode_only]
    if len(there) == 1:
        return set(there), set()
    if len(there) == 2:
        # The original takes the first, even one that is never to be read.
        first = readable[0] if readable else there[0]
        return {first}, set(there) - {first}
    upper = len(readable) - (not same)
    most = min(encoded[1] or upper, upper)
    least = min(encoded[0] or len(readable), len(readable), most)
    count = int(rng.integers(least, most + 1)) if most > 0 else 0
    read = {readable[i] for i in rng.permutation(len(readable))[:count]}
    if not same:
        return read, set(there) - read
    least = min(decoded[0] or 1, len(there))
    most = min(decoded[1] or len(there), len(there))
    count = int(rng.integers(least, max(least, most) + 1))
    return read, {there[i] for i in rng.permutation(len(there))[:count]}


def apply_rules(
    name: str,
    mask: np.ndarray,
    there: list[Bandset],
    encoded: set,
    decoded: set,
    *,
    strict: bool = False,
    whole: bool = False,
) -> np.ndarray:
    """Return a modality's mask after the choice of bandsets.

    A set that is not read has no token that is read; one that is read and not
    predicted none that is predicted. One that is not read keeps its predicted tokens
    whether it was chosen or not, as in the original, unless `strict`.

    Args:
        mask: int [..., S] of the modality.
        there: of `present`; a modality with none of them stays as it is.
        encoded, decoded: of `choose`.
        whole: all of a chosen set becomes what it was chosen for, because the base
            strategy has no structure for this modality.
    """
    mask = mask.copy()
    if name not in {modality for modality, _ in there}:
        return mask
    for i in range(mask.shape[-1]):
        one = mask[..., i]
        read, predicted = (name, i) in encoded, (name, i) in decoded
        if whole and (read or predicted):
            one[one != MISSING] = ONLINE if read else DECODER
            continue
        if whole and not strict:
            continue
        if not read:
            one[one == ONLINE] = TARGET_ONLY
        if not predicted and (read or strict):
            one[one == DECODER] = TARGET_ONLY
    return mask
