"""Muon and NorMuon: Nesterov momentum, orthogonalized for each matrix of the blocks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_jax.config.schema import OptimizerConfig
from slm_jax.distributed.partitioning import Partitions, map_matrices, partition_of
from slm_jax.model import ops

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024), chosen for the steepest slope at 0: small
# singular values reach 1 in few iterations, at the price of a spread around 1 that does no harm.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Polar Express (arXiv:2505.16932, algorithm 1): the best polynomial for each iteration, given those before it.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = 1.01  # The paper's margin for rounding: polynomials of x / 1.01, and a norm that is 1.01 times as large.
_ITERATIONS = 5


class MuonState(NamedTuple):
    """State of `scale_by_muon` with more than a momentum.

    Attributes:
        momentum: Tree like the parameters.
        second_moment: NorMuon: mean square of each neuron's update, [L, 1, out]; otherwise ().
        schedule: The step count of the momentum's schedule; () if the momentum is constant.
    """

    momentum: Any
    second_moment: Any = ()
    schedule: Any = ()


def state_partitions(config: OptimizerConfig, partitions: Partitions) -> Partitions:
    """Return the partitions of those arrays of the state that have other axes than their parameters."""
    if config.name != "normuon":
        return {}
    return {
        ("second_moment", *path): (*partition[:-2], None, partition[-1])
        for path, partition in partitions.items()
        if len(partition) == 3
    }


def scale_by_muon(
    dtype: jnp.dtype,
    partitions: Partitions | None = None,
    beta: float | optax.Schedule = 0.95,
    method: str = "newton-schulz",
    beta2: float | None = None,
) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized for each matrix [..., in, out].

    Updates are scaled to the root mean square of AdamW's, 0.2 · sqrt(max(in, out)) (arXiv:2502.16982), so that both
    optimizers share one learning rate and one weight decay. `optax.contrib.muon` computes the same; this one runs its
    products in `dtype` (bfloat16 halves its cost, and Newton-Schulz does not need more) and distributes the matrices
    over the devices.

    Args:
        dtype: Dtype of the products' operands.
        partitions: Declared partitions of the parameters; None: one device.
        beta: Decay of the momentum, or a function from the step to it.
        method: Iteration that orthogonalizes, see `orthogonalize`.
        beta2: NorMuon (arXiv:2510.05491): decay of the second moment of each neuron, see `_normalize`; None: Muon.
    """

    def init(params: Any) -> Any:
        momentum = jax.tree.map(jnp.zeros_like, params)
        if not callable(beta) and beta2 is None:
            return momentum
        neurons = () if beta2 is None else jax.tree.map(lambda x: jnp.zeros_like(x[..., :1, :]), params)
        count = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)) if callable(beta) else ()
        return MuonState(momentum, neurons, count)

    def scaled(path: tuple[Any, ...], x_LxIxO: jax.Array) -> jax.Array:
        f = functools.partial(orthogonalize, dtype=dtype, method=method)
        if partitions is None:
            orthogonal = f(x_LxIxO)
        else:
            orthogonal = map_matrices(f, x_LxIxO, partition_of(path, x_LxIxO, partitions))
        # An orthogonal [in, out] has entries with a root mean square of 1 / sqrt(max(in, out)).
        return orthogonal * 0.2 * max(x_LxIxO.shape[-2:]) ** 0.5

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        rich = state if isinstance(state, MuonState) else MuonState(state)
        b = beta(rich.schedule.count) if callable(beta) else beta
        momentum = jax.tree.map(lambda m, g: b * m + (1 - b) * g, rich.momentum, grads)
        # Nesterov: look one step ahead by applying the gradient to the new momentum again.
        nesterov = jax.tree.map(lambda m, g: b * m + (1 - b) * g, momentum, grads)
        updates = jax.tree_util.tree_map_with_path(scaled, nesterov)
        if beta2 is not None:
            second_moment = jax.tree.map(
                lambda v, x: beta2 * v + (1 - beta2) * jnp.mean(x * x, -2, keepdims=True), rich.second_moment, updates
            )
            updates = jax.tree.map(_normalize, updates, second_moment)
            rich = rich._replace(second_moment=second_moment)
        if callable(beta):
            rich = rich._replace(schedule=optax.ScaleByScheduleState(optax.safe_increment(rich.schedule.count)))
        return updates, rich._replace(momentum=momentum) if isinstance(state, MuonState) else momentum

    return optax.GradientTransformation(init, update)


def _normalize(x_LxIxO: jax.Array, second_moment_Lx1xO: jax.Array) -> jax.Array:
    """Return x with the columns, one for each output neuron, divided by their root mean square over the steps.

    The Frobenius norm of each matrix stays as it was, which makes a correction of the moment's bias unnecessary.
    """
    y = x_LxIxO / (jnp.sqrt(second_moment_Lx1xO) + 1e-10)
    norm = functools.partial(jnp.linalg.norm, axis=(-2, -1), keepdims=True)
    return y * (norm(x_LxIxO) / (norm(y) + 1e-10))


def orthogonalize(x_IxO: jax.Array, dtype: jnp.dtype, method: str = "newton-schulz") -> jax.Array:
    """Return about U·Vᵀ of the singular value decomposition.

    Each of five iterations x ← a x + (b x·xᵀ + c (x·xᵀ)²)·x applies the polynomial a s + b s³ + c s⁵ to the singular
    values s and leaves the singular vectors as they are.

    Args:
        x_IxO: A matrix, or a stack of them along leading axes.
        dtype: Dtype of the products' operands.
        method: "newton-schulz": always the same polynomial (Jordan et al. 2024); singular values end up between about
            0.7 and 1.2. "polar-express": another one in each iteration, chosen for the smallest error; values above
            1/1000 of the norm end up closer to 1.

    Returns:
        float32 [..., I, O].
    """
    is_polar = method == "polar-express"
    # Of x·xᵀ and xᵀ·x take the smaller one. The norm bounds the largest singular value by 1, where the iteration
    # converges.
    is_tall = x_IxO.shape[-2] > x_IxO.shape[-1]
    x = jnp.swapaxes(x_IxO, -1, -2) if is_tall else x_IxO
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / ((_SAFETY * norm if is_polar else norm) + 1e-7)
    table = jnp.array([(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS]) if is_polar else ()

    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        return ops.einsum("...ij,...jk->...ik", left, right, dtype)

    def iterate(i: Any, x: jax.Array) -> jax.Array:
        a, b, c = table[i] if is_polar else _NEWTON_SCHULZ
        gram = ops.einsum("...ik,...jk->...ij", x, x, dtype)
        return a * x + dot(b * gram + c * dot(gram, gram), x)

    x = jax.lax.fori_loop(0, _ITERATIONS, iterate, x)  # compiles five times as fast as an unrolled loop
    return jnp.swapaxes(x, -1, -2) if is_tall else x
