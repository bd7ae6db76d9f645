"""`cdl export`: the weights of a run as safetensors under the names of `transformers`."""

import argparse

import jax

from cdl.cli_store import one_run
from cdl.errors import UserError
from cdl.models import pretrained
from cdl.models.lora import LoRA, merge
from cdl.sweep import initial
from cdl.sweep.programs import stored_point
from cdl.sweep.store import Store
from cdl.train.checkpoint import read_weights

__all__ = ["export"]


def export(arguments: argparse.Namespace) -> None:
    """Write the newest weights that are saved; those of adapters as part of the kernels beside them."""
    store = Store(arguments.folder)
    point = stored_point(store, one_run(store, arguments.id))
    c = point.config
    params, stats, step = read_weights(store.checkpoints(point))
    if c.lora.rank and initial.fingerprint(c) != point.fingerprints["init.fingerprint"]:
        raise UserError(f"init={c.init!r} is not what was adapted; bring the same file, or run where it is")
    if c.lora.rank:
        params = merge(initial.load(c)[0], params, LoRA(**c.lora))
    pretrained.save(c.model.to_dict(), params, stats, arguments.out)
    n = sum(x.size for x in jax.tree.leaves(params))
    print(f"{n:,} parameters after {step} updates: {arguments.out}")
