"""What has a better form on TPUs: attention, and the embedding of whole images.

Written out, the map of attention [B, heads, T, T] passes through the device's memory in
float32, several times in a step. A Pallas kernel that comes with jax, "splash
attention", keeps a piece of it on the chip. It works in blocks of multiples of 128
queries and keys: what is shorter is padded.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vitssl.ops import accelerator, across

LANES = 128
_BLOCKS = (512, 384, 256, 128)
# So many times as large may padding make the map.
_MOST = 2.5


def takes(q, k) -> bool:
    """Return whether the kernel is for such shapes, on the devices of this trace."""
    if not accelerator.on_tpu() or _split(len(q)) is None:
        return False
    rows, keys, channels = q.shape[1], k.shape[1], q.shape[3]
    whole = channels <= LANES or channels % LANES == 0
    return whole and _up(rows) * _up(keys) <= _MOST * rows * keys


def _up(count) -> int:
    return count + -count % LANES


def _split(batch) -> int | None:
    """Return over how many devices a batch is split; None where that is not known."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1 if jax.device_count() == 1 else None
    return None if batch % mesh.size else mesh.size


def attention(q, k, v, length=None, interpret=False):
    """Softmax attention over a prefix of the keys; see `models.layers.attend`.

    Args:
        interpret: run the kernel's program on any device, slowly.
    """
    if length is None:
        length = jnp.full(len(k), k.shape[1], jnp.int32)
    one = functools.partial(_attention, interpret=interpret)
    if _split(len(q)) == 1:
        return one(q, k, v, length)
    # XLA cannot split a kernel: each device runs it on its rows.
    rows = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    own = dict(in_specs=rows, out_specs=rows, check_vma=False)
    return jax.shard_map(one, **own)(q, k, v, length)


def _attention(q, k, v, length, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, scale = q.shape[1], q.shape[3] ** -0.5
    q, k, v = (_padded(x).swapaxes(1, 2) for x in (q * scale, k, v))  # [B, heads, T, c]
    heads, most, keys = q.shape[1], q.shape[2], k.shape[2]
    # A query, of padding too, sees the keys of its segment.
    seen = (jnp.arange(keys) < length[:, None]).astype(jnp.int32)  # [B, T]
    segments = splash.SegmentIds(jnp.ones((len(q), most), jnp.int32), seen)
    one = splash.FullMask((most, keys))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one] * heads),
        block_sizes=_blocks(splash, most, keys),
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :rows]


def _padded(x):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, 0)))


@functools.cache
def _blocks(splash, rows, keys):
    row, key = (next(b for b in _BLOCKS if n % b == 0) for n in (rows, keys))
    return splash.BlockSizes(
        block_q=row,
        block_kv=key,
        block_q_dkv=row,
        block_kv_dkv=key,
        use_fused_bwd_kernel=True,
    )


_CONV = ("NHWC", "HWIO", "NHWC")


def _convolve(image, kernel):
    kernel, stride = across.whole(kernel.astype(image.dtype)), kernel.shape[:2]
    return jax.lax.conv_general_dilated(
        image, kernel, stride, "VALID", dimension_numbers=_CONV
    )


@jax.custom_vjp
def embed(image, kernel):
    """Apply a kernel to patches: [B, H, W, C], [p, p, C, D] -> [B, h, w, D].

    As a strided convolution, of which a TPU lays out the pixels itself: cut into
    patches first, they are copied twice. The gradient of the kernel is summed in its
    own dtype.
    """
    return _convolve(image, kernel)


def _embed_vjp(saved, g):
    image, kernel = saved
    _, of_image = jax.vjp(lambda x: _convolve(x, kernel), image)
    of_kernel = jax.lax.conv_general_dilated(
        image,
        g,
        (1, 1),
        "VALID",
        rhs_dilation=kernel.shape[:2],
        # Images are summed over, as channels are otherwise.
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=kernel.dtype,
    )
    return *of_image(g), of_kernel


embed.defvjp(lambda *given: (_convolve(*given), given), _embed_vjp)
