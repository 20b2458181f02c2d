"""Test the parameter tree: declared partitions and the kinds of parameters."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from slm_jax.distributed.partitioning import FSDP, REPLICATED, TENSOR
from slm_jax.model.abstract import abstract_model, declared_partitions
from slm_jax.model.params import collect_partitions, has_vocabulary_axis, is_matrix, parameter_group, pure_params
from tests.helpers import largest_difference, logits_of, tiny_config, tiny_model


@pytest.mark.parametrize("fields", [{}, {"model__tie_weights": False, "model__qk_norm": False, "model__kv_heads": 1}])
def test_every_parameter_declares_a_partition(fields):
    config = tiny_config(**fields)
    _, params = abstract_model(config, 61)
    partitions = declared_partitions(config, 61)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert {tuple(key.key for key in path) for path, _ in leaves} == partitions.keys()
    for path, leaf in leaves:
        partition = partitions[tuple(key.key for key in path)]
        # Matrices are split over both axes of the mesh, scales over none, layers never.
        assert len(partition) == (leaf.ndim if is_matrix(path, leaf) else 0)
        assert set(filter(None, partition)) == ({FSDP, TENSOR} if is_matrix(path, leaf) else set())


def test_partitions_of_a_sub_layer_need_one_all_reduce():
    """Split by columns, then by rows (Megatron-LM)."""
    partitions = declared_partitions(tiny_config(), 61)
    for first, last in (("attention.value", "attention.out"), ("mlp.up", "mlp.down")):
        assert partitions[("blocks", *first.split("."), "weight")] == (None, FSDP, TENSOR)
        assert partitions[("blocks", *last.split("."), "weight")] == (None, TENSOR, FSDP)
    assert partitions[("embedding",)] == (TENSOR, FSDP)
    assert partitions[("final_norm", "scale")] == REPLICATED


class Adapter(nnx.Module):
    def __init__(self, **metadata):
        self.weight = nnx.Param(jnp.zeros((3, 4)), **metadata)


class Model(nnx.Module):
    def __init__(self, **metadata):
        self.adapter = Adapter(**metadata)


def test_undeclared_parameter_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=re.escape("parameter adapter.weight declares no partition")):
        collect_partitions(Model())


def test_partition_must_have_an_entry_for_each_axis():
    with pytest.raises(ValueError, match=re.escape("adapter.weight has 2 axes, but declares the partition ('fsdp',)")):
        collect_partitions(Model(partition=(FSDP,)))
    assert collect_partitions(Model(partition=(None, FSDP))) == {("adapter", "weight"): (None, FSDP)}
    assert collect_partitions(Model(partition=REPLICATED)) == {("adapter", "weight"): REPLICATED}


def test_abstract_model_has_the_shapes_of_the_real_one():
    model = tiny_model(tie_weights=False)
    graph, shapes = abstract_model(tiny_config(model__tie_weights=False), 61)
    params = pure_params(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    ids = jnp.arange(12)[None]
    assert largest_difference(logits_of(nnx.merge(graph, params), ids), model(ids)) == 0


def test_kinds_of_parameters():
    _, params = abstract_model(tiny_config(model__tie_weights=False), 61)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    name = lambda path: ".".join(key.key for key in path)  # noqa: E731
    assert {name(path) for path, _ in leaves if has_vocabulary_axis(path)} == {"embedding", "head"}
    scales = {name(path) for path, leaf in leaves if not is_matrix(path, leaf)}
    assert scales == {name(path) for path, _ in leaves if path[-1].key == "scale"}
    groups = {name(path): parameter_group(path, leaf) for path, leaf in leaves}
    assert {groups[scale] for scale in scales} == {"vector"}
    assert (groups["embedding"], groups["head"]) == ("embedding", "head")
    assert {groups[name] for name in groups.keys() - scales - {"embedding", "head"}} == {"matrix"}
