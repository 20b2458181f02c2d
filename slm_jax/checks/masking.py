"""Checks of attention masks by gradient, which is exact: a masked token has a gradient of exactly zero.

The embedding vectors of a text are the variables, one per position, so that the gradient of one position's logits
shows the positions that it depends on, whatever the vocabulary and however often a token repeats.

Visible tokens are checked in one block, where a window is sharp; through L blocks it reaches L (window - 1) tokens
back. In the complete model only invisible tokens are checked, because the gradient of a visible one may round to zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.checks.finding import Finding, finding, skipped
from slm_jax.checks.uncached import run_uncached
from slm_jax.model.ops import causal_mask
from slm_jax.model.transformer import Transformer

_ROWS = 8  # positions examined at once, one per row
_TOKENS = 16384  # maximum number of tokens examined at once: long rows are fewer


def one_block(model: Transformer, layer: int = 0) -> Transformer:
    """Return the model with only one of its blocks."""
    graph, params = nnx.split(model, nnx.Param)
    tree = nnx.to_pure_dict(params)
    tree["blocks"] = jax.tree.map(lambda leaf: leaf[layer : layer + 1], tree["blocks"])
    single = nnx.merge(graph, tree)
    value_layers: tuple[int, ...] = ()
    if layer in model.config.value_embeddings and single.value_embeddings is not None:
        slot = model.config.value_embeddings.index(layer)
        value_layers = (0,)
        single.value_embeddings.layers = value_layers
        nnx.update(single.value_embeddings, jax.tree.map(lambda leaf: leaf[slot : slot + 1], tree["value_embeddings"]))
    else:
        single.value_embeddings = None
    window = model.config.layer_windows[layer]
    nope_layers = (0,) if layer in model.config.nope_layers else ()
    update = {"depth": 1, "window": window, "full_layers": (), "window_pattern": "", "nope_layers": nope_layers}
    update["value_embeddings"] = value_layers
    single.config = model.config.model_copy(update=update)
    return single


def dependencies(
    model: Transformer,
    ids_BxT: np.ndarray,
    at_B: np.ndarray,
    attention_mask_BxT: np.ndarray | None = None,
    segment_ids_BxT: np.ndarray | None = None,
    positions_BxT: np.ndarray | None = None,
) -> np.ndarray:
    """Return how much the logits of one position per row depend on each position.

    Args:
        model: The model.
        ids_BxT: Token ids, int32 [B, T].
        at_B: The position in each row, int [B].
        attention_mask_BxT: 1 for tokens, 0 for padding; None: no padding.
        segment_ids_BxT: Document of each position; None: one document.
        positions_BxT: Position within the document; None: as in the row.

    Returns:
        float32 [B, T], the L1 norm of the gradient by the embedding at each position; NaN where it is not finite.
    """
    b, t = ids_BxT.shape
    graph, params = nnx.split(model, nnx.Param)
    tree: dict[str, Any] = nnx.to_pure_dict(params)
    rows_NxD = tree.pop("embedding")[jnp.asarray(ids_BxT).reshape(-1)]
    if "value_embeddings" in tree:  # constants: what passes through them is masked as the other values are
        values = tree["value_embeddings"]
        tree["value_embeddings"] = {**values, "table": values["table"][:, jnp.asarray(ids_BxT).reshape(-1)]}
    head_VxD = model.head_weight()
    # A random mixture of all logits, so that a dependence of any of them shows.
    mixture_D = jax.random.normal(jax.random.key(0), head_VxD.shape[:1]) @ head_VxD
    mixture_D = mixture_D / jnp.linalg.norm(mixture_D)
    indices_BxT = np.arange(b * t, dtype=np.int32).reshape(b, t)

    def gradient(rows_NxD: jax.Array, tree: Any, mixture_D: jax.Array, masks: tuple[Any, ...]) -> jax.Array:
        def logits(rows_NxD: jax.Array) -> jax.Array:
            merged: Transformer = nnx.merge(graph, {**tree, "embedding": rows_NxD})
            x_BxTxD = merged.hidden(jnp.asarray(indices_BxT), *masks)
            return jnp.sum(x_BxTxD[np.arange(b), at_B] @ mixture_D)

        return jax.grad(logits)(rows_NxD)

    masks = (attention_mask_BxT, segment_ids_BxT, positions_BxT)
    gradient_BxTxD = np.asarray(run_uncached(gradient, rows_NxD, tree, mixture_D, masks)).reshape(b, t, -1)
    return np.abs(gradient_BxTxD).sum(axis=-1)  # NaN stays NaN


def causality(model: Transformer, length: int, fresh: bool = True, seed: int = 0) -> Finding:
    """Check that the logits of the complete model depend on no later token, and on none beyond the windows' reach.

    Args:
        model: The model.
        length: Tokens per row.
        fresh: The weights are untrained, so that every visible token has a gradient.
        seed: Seed of the token ids and positions.
    """
    windows = model.config.layer_windows
    reach = sum(window - 1 for window in windows) + 1 if all(windows) else 0
    ids_BxT, at_B = _probe(model, length, seed)
    found_BxT = dependencies(model, ids_BxT, at_B)
    expected = "no later token seen" + (f", none more than {reach - 1} back" if 0 < reach < length else "")
    # Through several windows in a row a gradient may be too small for float32.
    return _compare(
        "causality", found_BxT, _may_see(length, reach)[0, at_B], at_B, expected, fresh and not any(windows)
    )


def attention_window(model: Transformer, length: int, fresh: bool = True, seed: int = 0) -> Finding:
    """Check that one block attends to the last `window` tokens, the current one included, and to no other."""
    window = model.config.window
    if not 0 < window < length:
        return skipped("attention window", "no window: each token attends to all before it")
    if not any(model.config.layer_windows):
        return skipped("attention window", "no layer has the window: model.full_layers or window_pattern leave none")
    ids_BxT, at_B = _probe(model, length, seed)
    layer = model.config.layer_windows.index(window)
    found_BxT = dependencies(one_block(model, layer), ids_BxT, at_B)
    expected = f"one block sees the last {window} tokens, no other"
    return _compare("attention window", found_BxT, _may_see(length, window)[0, at_B], at_B, expected, fresh)


def padding(model: Transformer, length: int, fresh: bool = True, seed: int = 0) -> Finding:
    """Check that padding on either side changes nothing at positions with tokens."""
    ids_BxT, at_B = _probe(model, length, seed)
    mask_BxT = np.ones_like(ids_BxT)
    rows_B = np.arange(len(at_B))
    cut = max(1, length // 3)
    mask_BxT[0::2, length - cut :] = 0
    mask_BxT[1::2, :cut] = 0
    at_B = at_B * (length - cut) // length + np.where(rows_B % 2, cut, 0)
    found_BxT = dependencies(one_block(model), ids_BxT, at_B, mask_BxT)
    may_BxT = _may_see(length, model.config.layer_windows[0], valid_BxT=mask_BxT)[rows_B, at_B]
    return _compare("padding", found_BxT, may_BxT, at_B, "padding is never seen, all tokens are", fresh)


def segments(model: Transformer, length: int, fresh: bool = True, seed: int = 0) -> Finding:
    """Check that documents in the same row do not attend to each other."""
    ids_BxT, at_B = _probe(model, length, seed)
    cuts_BxT = np.random.default_rng(seed).random(ids_BxT.shape) < 4 / length
    cuts_BxT[:, 0] = False
    cuts_BxT[:, length // 2] = True
    segment_ids_BxT = np.cumsum(cuts_BxT, axis=1).astype(np.int32)
    starts_BxT = np.maximum.accumulate(np.where(cuts_BxT, np.arange(length), 0), axis=1)
    positions_BxT = (np.arange(length) - starts_BxT).astype(np.int32)
    found_BxT = dependencies(one_block(model), ids_BxT, at_B, None, segment_ids_BxT, positions_BxT)
    may_BxT = _may_see(length, model.config.layer_windows[0], segment_ids_BxT=segment_ids_BxT)[
        np.arange(len(at_B)), at_B
    ]
    return _compare("segments", found_BxT, may_BxT, at_B, "attention stays inside each document", fresh)


def _probe(model: Transformer, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids [B, T] and positions [B] from the first to the last."""
    random = np.random.default_rng(seed)
    rows = max(2, min(_ROWS, _TOKENS // length))
    at_B = np.linspace(0, length - 1, rows).astype(int)
    at_B[1:-1] += random.integers(0, 2, rows - 2)  # odd and even ones
    return random.integers(0, model.vocab_size, (rows, length)).astype(np.int32), np.minimum(at_B, length - 1)


def _may_see(length: int, window: int, valid_BxT: Any = None, segment_ids_BxT: Any = None) -> np.ndarray:
    """Return the mask by its definition, bool [B, T, T]."""
    return np.array(causal_mask(length, window, valid_BxT, segment_ids_BxT))


def _compare(
    name: str, found_BxT: np.ndarray, may_BxT: np.ndarray, at_B: np.ndarray, expected: str, fresh: bool
) -> Finding:
    own_B = found_BxT[np.arange(len(at_B)), at_B]
    blind_BxT = may_BxT & ~(found_BxT > 0)
    ok = _clean(found_BxT, ~may_BxT) and bool((own_B > 0).all()) and not (fresh and blind_BxT.any())
    text = f"{len(at_B)} positions of {found_BxT.shape[1]}: {_leaks(found_BxT, ~may_BxT)}"
    details = list(_where(found_BxT, ~may_BxT, at_B))
    if fresh and blind_BxT.any():
        text += f", {np.count_nonzero(blind_BxT)} of {np.count_nonzero(may_BxT)} visible tokens are not seen"
        row = int(blind_BxT.any(axis=1).argmax())
        details.append(f"position {at_B[row]} does not see {_list(np.flatnonzero(blind_BxT[row]))}")
    return finding(name, ok, text, expected, details)


def _clean(found_BxT: np.ndarray, forbidden_BxT: np.ndarray) -> bool:
    return bool((found_BxT[forbidden_BxT] == 0).all() and np.isfinite(found_BxT).all())


def _leaks(found_BxT: np.ndarray, forbidden_BxT: np.ndarray) -> str:
    if not np.isfinite(found_BxT).all():
        return "gradients that are not finite"
    leaks, total = np.count_nonzero(found_BxT[forbidden_BxT]), np.count_nonzero(forbidden_BxT)
    return f"{leaks} of {total} forbidden tokens seen" if leaks else "only visible tokens seen"


def _where(found_BxT: np.ndarray, forbidden_BxT: np.ndarray, at_B: np.ndarray) -> tuple[str, ...]:
    seen_BxT = forbidden_BxT & (found_BxT != 0)
    return tuple(
        f"position {at} depends on {_list(np.flatnonzero(row))}"
        for at, row in zip(at_B, seen_BxT, strict=True)
        if row.any()
    )[:4]


def _list(values: np.ndarray, max_values: int = 8) -> str:
    return ", ".join(map(str, values[:max_values].tolist())) + (", …" if len(values) > max_values else "")
