"""A case's configuration that knows what a check has read of it."""

import re
from collections.abc import Iterator

# Keys that a check may leave unread: "system/component/key" by pattern, and why.
_DRAWN = "what it draws is in the inputs"
_OFF = "of an option that is off"
_SAME = "the same numbers, computed otherwise"
_WORDS = "words"
IDLE = {
    r"hjepa/.*/(encoder_type|enc)": "a name; `encoder` has its numbers",
    r"hjepa/.*/(use_flash_attention|use_gradient_checkpointing)": _SAME,
    r"hjepa/.*/pretrained": "the weights are the case's",
    r"hjepa/.*/(fpn_fusion_method|layerscale_init)": _OFF,
    r"hjepa/(.*encoder.*|2-D rotary.*)/(predictor_.*|num_hierarchies|use_.*|fpn_.*|"
    r"projection_norm)": "of the whole model; the encoder alone is compared",
    r"hjepa/complete.*/(complement|equal_count)": _DRAWN,
    r"hvit/fine-tuning steps/betas": _WORDS,
    r"hybrid/OlmoEarthDataset.*/(note_crop|h5_dtypes\..*)": "of what it has not",
    r"hybrid/missing masks.*/patch_size": "its masks are of pixels",
    r"ifam/.*/(note|tree|train_extra|random_ranges\..*)": _WORDS,
    r"ifam/.*/(train|part_dropout(_stage_2)?|p)": _DRAWN,
    r"ifam/pdiscoformer/stem_width": "of timm's deep stems, which this is not",
    r"vitfreeze/FreezeOut original.*/.*(growthRate|depth)": "no layer depends on it",
    r"vitfreeze/theoretical compute.*/tokens_decoder": "per_image_GFLOP is of them",
    r"vitfreeze/linear-probe crop/scale": _WORDS,
}


class Record(dict):
    """A dict of a json that notes which of its values were looked at.

    A value that is itself a dict, or holds some, keeps its own account. Asking whether
    a key is there (`in`) reads nothing: its value is still to be used.
    """

    def __init__(self, values: dict):
        """Wrap `values` and the dicts in them."""
        super().__init__({k: recorded(v) for k, v in values.items()})
        self.seen = set()

    def __getitem__(self, key):
        """Return the value, and note that."""
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        """As a dict's."""
        return self[key] if key in self else default

    def __iter__(self):
        """As a dict's. That it is defined makes `**config` read through `[key]`."""
        return super().__iter__()

    def values(self):
        """As a dict's; all are read."""
        return [self[key] for key in self]

    def items(self):
        """As a dict's; all are read."""
        return [(key, self[key]) for key in self]

    def unread(self) -> Iterator[str]:
        """Yield "a.b.0.c" of every value that nothing has looked at."""
        for key, value in super().items():
            inner = list(_inside(value, str(key)))
            if inner:
                for path, record in inner:
                    yield from (f"{path}.{name}" for name in record.unread())
            elif key not in self.seen:
                yield str(key)


def recorded(value):
    """Return `value` of a json with every dict in it a `Record`."""
    if isinstance(value, dict):
        return Record(value)
    if isinstance(value, list):
        return [recorded(v) for v in value]
    return value


def _inside(value, path):
    """Yield (path, record) of the records that a value is or holds directly."""
    if isinstance(value, Record):
        yield path, value
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _inside(one, f"{path}.{i}")


def agree(config: dict, **facts) -> None:
    """Assert that the config says what the arrays, or the only way there is, say.

    A key that it leaves out says nothing.
    """
    for key, fact in facts.items():
        want = config.get(key, fact)
        assert want == fact, f"config {key}={want!r}: this check knows {fact!r}"


def forgotten(case) -> list[str]:
    """Return the keys of a case that nothing has read, but for those of `IDLE`."""
    where = f"{case.meta['system']}/{case.meta['component']}"
    paths = (
        f"{path}.{key}".lstrip(".")
        for path, record in _inside(case.config, "")
        for key in record.unread()
    )
    return [
        path
        for path in paths
        if not any(re.fullmatch(idle, f"{where}/{path}") for idle in IDLE)
    ]
