"""The engine's programs, ready to be lowered for described devices: the blocks of a decoding step, and of one that also
takes a chunk of a prompt."""

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ..models.config import DecoderConfig
from ..serving.batch import Bucket
from ..serving.engine_config import CACHE_DTYPES
from ..serving.programs import Programs
from ..serving.step_sizes import PIECE
from ..sharding.plan import Plan
from .programs import Program, names_of
from .workload import CHUNK, PAGE

# What the programs take, by the beginning of their names: weights, the cache, and the rest.
ARGUMENTS = {"layers": "parameters", "outside": "parameters", "cache": "cache"}


def serve_programs(request: dict[str, Any], config: DecoderConfig, plan: Plan, mesh: Mesh) -> Iterator[Program]:
    """`decode`: every request gets a token. `chunk`: and one gets 1,024 tokens of its prompt. `finish`: sampling.
    `prompt`: how likely tokens of a prompt are, which requests may ask for."""
    pages, kept = -(-request["seq_len"] // PAGE), request["cache_dtype"]
    made = Programs(
        config,
        slots=request["rows"],
        num_pages=pages * request["rows"],
        page_size=PAGE,
        pages_per_request=pages,
        dtype=jnp.dtype(request["dtype"]),
        cache_dtype=None if kept is None else CACHE_DTYPES[kept],
        mesh=mesh,
    )
    names = names_of(config, mesh, ARGUMENTS)
    rows = request["rows"]
    kinds = config.kinds  # an accelerator runs all blocks in one program
    wanted = {
        "decode": ("blocks", (Bucket(rows, 0), kinds)),
        "chunk": ("blocks", (Bucket(rows, CHUNK), kinds)),
        "finish": ("finish", rows),
        "prompt": ("prompt", PIECE),
    }
    for name, (program, key) in wanted.items():
        yield name, functools.partial(made.lower, program, key), names
