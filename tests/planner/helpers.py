"""Small models, and their training step compiled for the simulated devices of this machine."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from twinax.layers.moe_config import MoEConfig
from twinax.models.config import DecoderConfig
from twinax.planner.buffers import Memory, read_memory
from twinax.planner.costs import Costs, count
from twinax.planner.hlo import Module
from twinax.planner.programs import TRAIN_ARGUMENTS, lower_train, names_of
from twinax.planner.workload import Layout, Workload

DENSE = DecoderConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=4096,
)  # fmt: skip
SPARSE = DecoderConfig(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=4096, moe=MoEConfig(num_experts=8, experts_per_token=2, expert_size=64),
)  # fmt: skip


def compile_here(workload: Workload, layout: Layout, folder: Path | None = None) -> Any:
    """The step compiled for simulated CPU devices; with a folder, XLA's dump is in it.

    A program that this process has compiled before is not compiled again, and so leaves no dump.
    """
    request = {
        "rows": workload.rows,
        "seq_len": workload.seq_len,
        "dtype": workload.dtype,
        "accumulation": layout.accumulation,
        "remat": layout.remat,
    }
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if folder is not None:
        options |= {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    return lower_train(request, workload.model, layout.plan, layout.plan.mesh()).compile(compiler_options=options)


def memory_of(workload: Workload, layout: Layout, folder: Path) -> Memory:
    """What the dump in a folder says."""
    return read_memory(folder, names_of(workload.model, layout.plan.mesh(), TRAIN_ARGUMENTS))[0]


@lru_cache(maxsize=8)
def costs_of(workload: Workload, layout: Layout) -> Costs:
    """Costs of the compiled step."""
    return count(Module.parse(compile_here(workload, layout).as_text()), layout.plan.sizes)
