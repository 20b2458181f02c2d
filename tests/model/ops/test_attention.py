"""Test every implementation of attention against the naive one: values and gradients, every mask, any length."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distributed import sharding
from slm_jax.distributed.partitioning import map_over_batch_and_heads
from slm_jax.distributed.platform import Platform
from slm_jax.model.ops import attention, describe_attention, naive_attention
from slm_jax.model.ops.attention_blocks import blockwise_attention
from slm_jax.model.ops.attention_kernels import _splash_tile, cudnn_attention, splash_attention
from slm_jax.model.precision import compute_dtype
from slm_jax.utils.errors import UserError
from tests.helpers import BFLOAT16, FLOAT16, FLOAT32, cosine, largest_difference, tiny_config


def inputs(length, heads=4, kv_heads=4, batch=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda h: jnp.asarray(rng.normal(size=(batch, length, h, width)), jnp.float32)  # noqa: E731
    return make(heads), make(kv_heads), make(kv_heads), make(heads)


def segments(length, batch=2):
    return jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (batch, length)), axis=1))


def padding(length, batch=2):
    return jnp.asarray(np.arange(length)[None] < np.array([[length], [length - length // 3]])[:batch], jnp.int32)


def both(q, k, v, g, dtype, window=0, valid=None, segment_ids=None, on_gpu=False):
    """Yield (output, gradients) of blockwise and of naive attention."""
    for f in (
        lambda q, k, v: blockwise_attention(q, k, v, valid, segment_ids, dtype, window, on_gpu),
        lambda q, k, v: naive_attention(q, k, v, dtype, window, valid, segment_ids),
    ):
        yield jax.jit(lambda q, k, v, g, f=f: (f(q, k, v), jax.vjp(f, q, k, v)[1](g)))(q, k, v, g)


@pytest.mark.parametrize(
    ("length", "kv_heads", "window"), [(1, 4, 0), (5, 2, 3), (64, 1, 1), (128, 4, 70), (200, 2, 0), (257, 1, 70)]
)
def test_equals_naive_in_float32(length, kv_heads, window):
    q, k, v, g = inputs(length, kv_heads=kv_heads)
    fast, naive = both(q, k, v, g, FLOAT32, window)
    assert largest_difference(fast, naive) < 5e-6  # sums of up to 257 float32 terms in another order


def test_sums_of_a_gpu_equal_naive():
    q, k, v, g = inputs(150, kv_heads=2)
    fast, naive = both(q, k, v, g, FLOAT32, 40, padding(150), on_gpu=True)
    assert largest_difference(fast, naive) < 5e-6


@pytest.mark.parametrize("masked", ["segments", "padding", "both"])
def test_equals_naive_with_masks(masked):
    q, k, v, g = inputs(150, kv_heads=2)
    valid = padding(150) if masked != "segments" else None
    segment_ids = segments(150) if masked != "padding" else None
    fast, naive = both(q, k, v, g, FLOAT32, 40, valid, segment_ids)
    assert largest_difference(fast, naive) < 5e-6


def test_bfloat16_gradients_have_the_same_direction():
    q, k, v, g = inputs(256)
    fast, naive = both(q, k, v, g, BFLOAT16)
    exact = list(both(q, k, v, g, FLOAT32))[1]
    assert cosine(fast[1], naive[1]) > 0.9999
    assert cosine(fast[1], exact[1]) > 0.9999


def test_window_is_exact_at_its_edges():
    q, k, v, _ = inputs(140, batch=1)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(t, window):
        return jax.grad(lambda v: attention(q, k, v, FLOAT32, window)[0, t].sum())(v)

    def reaches(s, t, window):
        """Return whether the output at t depends on the value at s."""
        return bool(np.any(np.asarray(gradient(t, window))[0, s] != 0))

    for t in (5, 100, 139):
        assert reaches(t, t, 3)
        assert reaches(t - 2, t, 3)
        assert not reaches(t - 3, t, 3)
        assert reaches(0, t, t + 1)
        assert not reaches(0, t, t)
    assert not reaches(101, 100, 0)


def on_xla(*args):
    """Run cudnn_attention on XLA: the same JAX function with the same arguments."""
    return cudnn_attention(*args, implementation="xla")


def interpreted(*args):
    """Run the TPU kernel's program in the interpreter."""
    return splash_attention(*args, interpret=True)


@pytest.mark.parametrize("kernel", [on_xla, interpreted])
@pytest.mark.parametrize(("kv_heads", "window"), [(4, 0), (2, 70), (1, 1)])
@pytest.mark.parametrize("masked", ["no", "both"])
def test_kernels_equal_naive(kernel, kv_heads, window, masked):
    """Compare real queries only; the outputs of padding queries are unspecified."""
    length = 256
    q, k, v, g = inputs(length, kv_heads=kv_heads)
    valid, segment_ids = (padding(length), segments(length)) if masked == "both" else (None, None)
    if valid is not None:
        g = g * valid[:, :, None, None]
    fast, naive = (
        jax.jit(lambda q, k, v, f=f: (jnp.where(g == 0, 0, f(q, k, v)), jax.vjp(f, q, k, v)[1](g)))(q, k, v)
        for f in (
            lambda q, k, v: kernel(q, k, v, valid, segment_ids, FLOAT32, window),
            lambda q, k, v: naive_attention(q, k, v, FLOAT32, window, valid, segment_ids),
        )
    )
    assert largest_difference(fast, naive) < 3e-5  # of gradients of size 10


def test_kernel_is_mapped_over_several_devices():
    """XLA cannot partition a kernel."""
    mesh = sharding.make_mesh(tiny_config(mesh__tensor=2))
    assert mesh.size == 8
    q, k, v, _ = inputs(128, batch=8, kv_heads=2)

    def gradients(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            kernel = lambda *x: interpreted(*x, None, None, FLOAT32, 0)  # noqa: E731
            f = lambda *x: jnp.sum(jnp.sin(map_over_batch_and_heads(kernel, x, ())))  # noqa: E731
            return jax.grad(f, argnums=(0, 1, 2))(q, k, v)

    split = jax.jit(gradients)(**sharding.shard_batch(mesh, {"q": q, "k": k, "v": v}))
    naive = lambda *x: jnp.sum(jnp.sin(naive_attention(*x, FLOAT32)))  # noqa: E731
    expected = jax.jit(jax.grad(naive, argnums=(0, 1, 2)))(q, k, v)
    assert "data" in split[0].sharding.spec
    assert largest_difference(split, expected) < 3e-5


def test_unavailable_implementation_is_rejected_by_name():
    assert describe_attention("auto", BFLOAT16, 256, 64) == "attention in blocks"
    for name, missing in (("cudnn", "no NVIDIA GPU"), ("splash", "no TPU")):
        with pytest.raises(UserError, match=f"model.attention {name}: there is {missing}"):
            describe_attention(name, BFLOAT16, 256, 64)


@pytest.mark.parametrize(
    ("dtype", "length", "width", "reason"),
    [(FLOAT32, 256, 64, "float16 only"), (BFLOAT16, 256, 36, "36 wide"), (BFLOAT16, 255, 64, "odd")],
)
def test_gpu_falls_back_to_blocks_with_a_reason(dtype, length, width, reason):
    hopper = Platform("gpu", "9.0")
    assert describe_attention("auto", BFLOAT16, 256, 64, hopper) == "attention by cuDNN"
    described = describe_attention("auto", dtype, length, width, hopper)
    assert described.startswith("attention in blocks (cudnn: ")
    assert reason in described


def test_amd_gpus_have_no_cudnn():
    described = describe_attention("auto", BFLOAT16, 256, 64, Platform("gpu", "gfx942"))
    assert described == "attention in blocks (cudnn: there is no NVIDIA GPU)"


def test_float32_on_a_tpu_is_computed_in_full_precision():
    """The products of splash attention request no precision: a TPU would round their operands to bfloat16."""
    tpu = Platform("tpu")
    assert describe_attention("auto", BFLOAT16, 256, 64, tpu) == "attention by splash attention"
    assert "float32 precision" in describe_attention("auto", FLOAT32, 256, 64, tpu)
    assert describe_attention("auto", FLOAT32, 256, 64, tpu).startswith("attention in blocks")
    with pytest.raises(UserError, match="float32 precision"):
        describe_attention("splash", FLOAT32, 256, 64, tpu)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ("6.0", FLOAT32),
        ("7.0", FLOAT16),
        ("7.5", FLOAT16),
        ("8.0", BFLOAT16),
        ("12.0", BFLOAT16),
        *((name, FLOAT32) for name in ("gfx900", "gfx906", "gfx90c", "gfx1030")),
        *((name, BFLOAT16) for name in ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")),
    ],
)
def test_gpus_with_16_bit_units(capability, dtype):
    assert compute_dtype("auto", Platform("gpu", capability)) == dtype


@pytest.mark.parametrize("name", ["cuda", "rocm", "gpu", "tpu", "cpu"])
def test_platform_of_a_device(name):
    """Devices of a topology carry the plugin's name; only GPUs have a capability."""
    device = SimpleNamespace(platform=name, compute_capability="9.0")
    is_gpu = name in ("cuda", "rocm", "gpu")
    assert Platform.of_device(device) == Platform("gpu" if is_gpu else name, "9.0" if is_gpu else "")


@pytest.mark.parametrize(
    ("length", "window", "tile"),
    [(1024, 0, 1024), (512, 0, 512), (4096, 0, 1024), (384, 0, 128), (1024, 300, 256), (1024, 5, 128)],
)
def test_splash_tiles_divide_the_sequence_and_fit_the_window(length, window, tile):
    assert _splash_tile(length, window) == tile
