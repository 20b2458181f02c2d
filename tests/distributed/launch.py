"""Start a command with faults of the machine that it runs on: `python -m tests.distributed.launch FAULTS COMMAND …`.

FAULTS is a JSON object:

    unreadable    part of the paths of files whose reading fails (checksums and positions of checkpoints)
    unrestorable  part of the paths of checkpoints whose arrays cannot be read, though their checksums can
    memory        bytes of free memory
    stale         part of the paths that are remembered as missing, once they were, as by a network file system
    nan           [step, row]: that row of that step's batch makes NaN, in the process that computes it
"""

import builtins
import errno
import io
import json
import os
import sys
from pathlib import Path


def fail(path, part):
    if part in str(path):
        raise OSError(errno.EIO, "injected read error", str(path))


def make_unreadable(part):
    from slm_jax.run import checkpoint, checksums

    def checksum(path, original=checksums._checksum):
        fail(path, part)
        return original(path)

    checksums._checksum = checksum

    def read_position(folder, step, original=checkpoint.read_position):
        fail(folder / str(step) / "position", part)
        return original(folder, step)

    checkpoint.read_position = read_position


def make_unrestorable(part):
    import orbax.checkpoint as ocp

    def restore(self, directory, *args, original=ocp.StandardCheckpointHandler.restore, **kwargs):
        fail(directory, part)
        return original(self, directory, *args, **kwargs)

    ocp.StandardCheckpointHandler.restore = restore


def limit_memory(free):
    from slm_jax.training import memory

    memory.free_host_memory = lambda: free


def make_stale(part):
    """Remember each path that was missing, as long as this process does not create it.

    Not in checkpoints that are being written, where Orbax looks for folders that several processes create.
    """
    missing = set()

    def lookup(original):
        def call(path=".", *args, **kwargs):
            name = Path(path).absolute() if isinstance(path, str | os.PathLike) else Path()
            if part not in str(name) or ".orbax-checkpoint-tmp" in str(name) or creates(*args, **kwargs):
                missing.discard(name)
                return original(path, *args, **kwargs)
            if name in missing:
                raise FileNotFoundError(errno.ENOENT, "remembered as missing", str(name))
            try:
                return original(path, *args, **kwargs)
            except FileNotFoundError:
                missing.add(name)
                raise

        return call

    def creates(mode="r", *args, **kwargs):
        return bool(set(mode) & set("wax")) if isinstance(mode, str) else bool(mode & os.O_CREAT)

    def creation(original, target):
        def call(*paths, **kwargs):
            missing.discard(Path(paths[target]).absolute())
            return original(*paths, **kwargs)

        return call

    for module, names in ((os, ("stat", "lstat", "scandir", "listdir", "open")), (io, ("open",))):
        for name in names:
            setattr(module, name, lookup(getattr(module, name)))
    builtins.open = io.open
    for name, target in (("mkdir", 0), ("rename", 1), ("replace", 1), ("link", 1), ("symlink", 1)):
        setattr(os, name, creation(getattr(os, name), target))


def make_nan(at):
    """Make the hidden states at <PAD> NaN, and put one <PAD> into a row of a step's batch."""
    import jax.numpy as jnp

    from slm_jax.data.batches.packed import PackedBatches
    from slm_jax.model.transformer import Transformer
    from tokenizer.vocabulary import SPECIAL_TOKENS

    pad = SPECIAL_TOKENS.index("<PAD>")
    wanted_step, wanted_row = at

    def hidden(self, input_ids, *args, original=Transformer.hidden, **kwargs):
        return jnp.where((input_ids == pad)[..., None], jnp.nan, original(self, input_ids, *args, **kwargs))

    def batch_at(self, step, shard=0, num_shards=1, original=PackedBatches.at):
        batch = original(self, step, shard, num_shards)
        row = wanted_row - shard * len(batch["input_ids"])
        if step == wanted_step and 0 <= row < len(batch["input_ids"]):
            batch = batch | {"input_ids": batch["input_ids"].copy()}
            batch["input_ids"][row, 3] = pad
        return batch

    Transformer.hidden = hidden
    PackedBatches.at = batch_at


FAULTS = {
    "unreadable": make_unreadable,
    "unrestorable": make_unrestorable,
    "memory": limit_memory,
    "stale": make_stale,
    "nan": make_nan,
}

if __name__ == "__main__":
    from slm_jax.cli import run_main

    faults, command, *arguments = sys.argv[1:]
    for fault, value in json.loads(faults).items():
        FAULTS[fault](value)
    sys.argv = [command, *arguments]
    run_main(f"slm_jax.cli.{command}")
