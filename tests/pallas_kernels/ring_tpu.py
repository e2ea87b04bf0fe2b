"""The TPU kernels of ring attention in interpret mode, on simulated devices: a process of its own, for its test.

It needs more threads than the machine may have cores, as each device waits for the others in a thread of its own, and
XLA makes as many as NPROC says when it starts. Reads cases as JSON from its first argument, prints what it found.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from twinax.pallas_kernels.flash_attention import flash_attention
from twinax.pallas_kernels.ring_attention import ring_attention, unzigzag, zigzag


def check(n, mode, chunk, B=1, H=2, K=1, D=8, segments=False, dtype="float32", backward=True, large=1.0, **options):
    """The largest difference of each result, over the largest number of that result, and whether there were races.

    What padding holds is infinite.
    """
    length, rng = 2 * n * chunk, np.random.default_rng(n)
    shapes = [(B, length, heads, D) for heads in (H, K, K, H)]
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    q, ids = q * large, None
    if segments:
        ids = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
        ids[ids == 2] = -1
        ids[:, length // 3 : length // 3 + chunk + 3] = 0
        ids[0, -3:] = 0
        q, k, v = (jnp.where((ids == 0)[:, :, None, None], jnp.inf, x) for x in (q, k, v))
    mesh, cut = Mesh(np.array(jax.devices()[:n]), ("ring",)), PartitionSpec(None, "ring")

    def attend(q, k, v, *ids):
        more = {"segment_ids_BT": ids[0] if ids else None, **options}
        return ring_attention(q, k, v, axis="ring", implementation="tpu", **more)

    island = jax.shard_map(attend, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    extra = [] if ids is None else [zigzag(jnp.asarray(ids), n, 1)]

    def run(q, k, v, d_out):
        out, pullback = jax.vjp(lambda q, k, v: island(q, k, v, *extra), q, k, v)
        return (out, *pullback(d_out)) if backward else (out,)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)):
        got = jax.block_until_ready(jax.jit(run)(*(zigzag(x, n, 1) for x in (q, k, v, d_out))))
    races = bool(interpret_pallas_call.races.races_found)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, d_out)]

        def plain(q, k, v):
            return flash_attention(q, k, v, q_segment_ids_BT=ids, implementation="reference", **options)

        out, pullback = jax.vjp(plain, *wide[:3])
        wanted = [np.asarray(x) for x in (out, *pullback(wide[3]))]
    found = [np.asarray(unzigzag(x, n, 1), np.float64) for x in got]
    errors = [float(np.abs(x - y).max() / (np.abs(y).max() or 1.0)) for x, y in zip(found, wanted, strict=False)]
    finite = all(np.isfinite(x).all() for x in found)
    return {"errors": errors, "races": races, "finite": finite, "dtypes": [str(x.dtype) for x in got]}


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print("FOUND " + json.dumps(check(**case)), flush=True)
