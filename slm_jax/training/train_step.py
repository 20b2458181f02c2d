"""The pure, compiled train and evaluation steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.model import ops
from slm_jax.model.params import abstract_model
from slm_jax.model.transformer import Transformer, resize_vocabulary_rows
from slm_jax.training import health
from slm_jax.training.optimizer import make_optimizer, make_schedule

Batch = dict[
    str, jax.Array
]  # input_ids, labels (already the next token, -100: none) int32 [B, T]; masks as in Transformer


class TrainState(NamedTuple):
    """All that training changes, and the key it draws from."""

    step: jax.Array  # int32 scalar: optimizer steps taken
    params: Any  # pure dict of float32 arrays
    opt_state: Any
    key: jax.Array  # typed PRNG key; the randomness of a step is fold_in(key, step)
    health: Any = ()  # health.Health; nothing unless `config.health` asks for it


class Steps(NamedTuple):
    """The compiled functions of one run."""

    init: Any  # () -> TrainState
    train: Any  # (TrainState, Batch) -> (TrainState, metrics)
    evaluate: Any  # (params, Batch) -> LossSums
    model: Callable[[Any], Transformer]


def loss_sums(
    model: Transformer, batch: Batch, terms: ops.LossWeights = ops.LossWeights(), dropout_key: jax.Array | None = None
) -> ops.LossSums:
    """The sums of the next-token loss over a batch; hidden state t is scored against labels[:, t]."""
    x_BxTxD = model.hidden(
        batch["input_ids"],
        batch.get("attention_mask"),
        batch.get("segment_ids"),
        batch.get("positions"),
        dropout_key=dropout_key,
    )
    seen = None
    if terms.ul_alpha:
        seen = ops.ContextTokens.of(batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids"))
    return ops.cross_entropy(x_BxTxD, model.head_weight(), batch["labels"], model.dtype, terms, seen, model.vocab_size)


def resize_vocabulary(state: TrainState, model: Transformer, vocab_size: int) -> TrainState:
    """The state for another vocabulary size, its parameters in the model as well.

    Old ids keep their rows of the parameters and of the optimizer's moments bit for bit; new ones begin as in
    `Transformer.resize_token_embeddings`, their moments at 0.
    """
    nnx.update(model, state.params)
    old_size = model.vocab_size
    model.resize_token_embeddings(vocab_size, jax.random.fold_in(state.key, state.step))

    def resize(path: tuple[Any, ...], moment: jax.Array) -> jax.Array:
        if not {getattr(part, "key", None) for part in path} & {"embedding", "head"}:
            return moment
        return resize_vocabulary_rows(moment, old_size, vocab_size, jnp.zeros(model.embedding[...].shape, moment.dtype))

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return state._replace(params=params, opt_state=jax.tree_util.tree_map_with_path(resize, state.opt_state))


def make_steps(config: Config, vocab_size: int, mesh: jax.sharding.Mesh | None = None) -> Steps:
    """The functions of a run, all pure; `train` gives its state away (donated). mesh: the devices that hold the state,
    split as in sharding.py (None: one device)."""
    graph, _ = abstract_model(config, vocab_size)
    dtype = ops.compute_dtype(config.train.dtype)
    optimizer = make_optimizer(config.optimizer, config.train.steps, dtype)
    schedule = make_schedule(config.optimizer, config.train.steps)
    terms = ops.LossWeights(config.train.z_loss, config.train.ul_alpha)
    is_watched = health.is_watched(config.health)

    def init() -> TrainState:
        key = jax.random.key(config.train.seed)
        model = Transformer(config.model, vocab_size, dtype=dtype, rngs=nnx.Rngs(params=jax.random.fold_in(key, 0)))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        watch = health.begin() if is_watched else ()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.fold_in(key, 1), watch)

    split = None if mesh is None else sharding.tree_shardings(mesh, jax.eval_shape(init))

    def merge(params: Any) -> Transformer:
        return nnx.merge(graph, params)

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, ops.LossSums]:
        sums = loss_sums(merge(params), batch, terms, key)
        return sums.loss, sums

    def gradients(params: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, ops.LossSums]:
        """Gradient of the mean loss over the batch's predicted positions, in equal parts, one after the other."""
        parts = config.train.grad_accum_steps
        if parts == 1:
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        else:

            def one_part(carry, part):
                i, micro = part
                part_key = None if key is None else jax.random.fold_in(key, i)
                (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, micro, part_key)
                return jax.tree.map(jnp.add, carry, (grads, sums)), None

            zeros = jax.tree.map(jnp.zeros_like, (params, ops.LossSums(*(jnp.zeros(()) for _ in range(4)))))
            # Every parts-th row, so that each part holds rows of every device.
            split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
            (grads, sums), _ = jax.lax.scan(one_part, zeros, (jnp.arange(parts), split))
        # Sums first, one division at the end: parts with fewer predicted positions weigh less, as in one large batch.
        count = jnp.maximum(sums.tokens, 1.0)
        return jax.tree.map(lambda g: g / count, grads), sums

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step) if config.model.dropout else None
        grads, sums = gradients(state.params, batch, key)
        if split is not None:  # the sums over devices are split as what they update
            grads = jax.lax.with_sharding_constraint(grads, split.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = jnp.maximum(sums.tokens, 1.0)
        metrics = {
            "loss": sums.nll / count,
            "accuracy": sums.correct / count,
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(grads),
        }
        watch: Any = ()
        if is_watched:
            watch, take, report = health.examine(state.health, config.health, metrics["loss"], metrics["grad_norm"])
            params, opt_state = health.choose(take, (params, opt_state), (state.params, state.opt_state))
            metrics |= report
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        inputs = jnp.int32(ids.size) if mask is None else jnp.sum(mask)  # what is no padding
        metrics |= {"param_norm": optax.tree.norm(params), "tokens": sums.tokens, "input_tokens": inputs}
        if config.log.layers:
            trees = {"grad_norm": grads, "param_norm": params, "update_norm": updates}
            metrics["layers"] = {name: health.layer_norms(tree) for name, tree in trees.items()}
        return TrainState(state.step + 1, params, opt_state, state.key, watch), metrics

    def evaluate(params: Any, batch: Batch) -> ops.LossSums:
        return loss_sums(merge(params), batch)

    def in_mesh(f: Callable[..., Any]) -> Callable[..., Any]:
        """f traced with the mesh in sight: kernels that XLA cannot split are mapped over it (ops)."""

        @functools.wraps(f)
        def traced(*args: Any) -> Any:
            assert mesh is not None
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return f(*args)

        return traced

    given = () if config.train.debug else 0  # jax_debug_nans takes a step again that made one
    if mesh is None:
        return Steps(jax.jit(init), jax.jit(train, donate_argnums=given), jax.jit(evaluate), merge)
    whole = sharding.replicated(mesh)
    return Steps(
        jax.jit(init, out_shardings=split),  # made where they are to be: no device ever holds all
        jax.jit(in_mesh(train), donate_argnums=given, out_shardings=(split, whole)),
        jax.jit(in_mesh(evaluate), out_shardings=whole),
        merge,
    )
