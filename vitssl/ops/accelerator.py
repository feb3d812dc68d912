"""What the device at hand can do, asked while a function is traced.

The plain forms run everywhere; where a device has a better one, these say so.
"""

import jax

# From these compute capabilities on cuDNN has attention, and heads of 256 channels.
AMPERE, HOPPER = (8, 0), (9, 0)


def on_cpu() -> bool:
    """Return whether functions are traced for the CPU."""
    return jax.default_backend() == "cpu"


def on_tpu() -> bool:
    """Return whether functions are traced for a TPU."""
    return jax.default_backend() == "tpu"


def capability() -> tuple[int, int]:
    """Return (major, minor) of an NVIDIA GPU, (0, 0) of any other device."""
    if jax.default_backend() != "gpu":
        return 0, 0
    # AMD's devices have a name in this place.
    text = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if (major + minor).isdigit() else (0, 0)


def precision():
    """Return the `precision` of float32 products that must keep more than 10 bits.

    10 are a GPU's default and 8 a TPU's, of which a temperature of 0.1 loses 3. Three
    products of the upper and lower halves in bfloat16 keep 16, at a fifth of the cost
    of float32, which no matrix unit has; a TPU would make six. The sums are float32.
    """
    if capability() >= AMPERE or on_tpu():
        return jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    return "highest"
