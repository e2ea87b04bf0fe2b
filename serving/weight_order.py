"""Quantised weights in the order in which the chip that serves reads them fastest."""

import dataclasses

import jax.numpy as jnp

from ..checkpoints.load import LoadedModel
from ..models.config import DecoderConfig
from ..pallas_kernels.chips import TPUS, target_chip
from ..pallas_kernels.quantized_matmul import PACKED


def config_in_order(config: DecoderConfig, chip: str | None = None) -> DecoderConfig:
    """The config of what `in_order` makes of a model."""
    kept = config.quantization
    if kept is None or kept.format in PACKED or (chip or target_chip()) not in TPUS.values():
        return config
    return dataclasses.replace(config, quantization=dataclasses.replace(kept, inputs_first=True))


def in_order(loaded: LoadedModel, chip: str | None = None) -> LoadedModel:
    """The model with float8 weights inputs first (`quantized_matmul.with_inputs_first`) on a TPU.

    Experts' weights in blocks are read there as they are kept only in this order; in the other all of them would be
    made bfloat16 at every step. Other products are as fast on v5e and v5p, and faster on v6e and 7x.

    The arrays that are turned are taken out of `loaded`, one by one, so that only one is there twice.

    Args:
        chip: as `chips.target_chip` says it, which is asked by default.
    """
    config = config_in_order(loaded.config, chip)
    if config == loaded.config:
        return loaded
    params = dict(loaded.params)
    loaded.params.clear()
    for name in params:
        if name.endswith(".values"):
            params[name] = jnp.swapaxes(params[name], -1, -2)
    return dataclasses.replace(loaded, config=config, params=params)
