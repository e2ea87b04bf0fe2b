"""Rows that go to other devices of one mesh axis and come back, however many go to each. For `shard_map` islands.

Shapes: P devices of the axis, R rows of one, sorted by destination, S slots for the rows from one device, D width.

Shapes are static, so a device keeps S slots for each sender, as many as a sender could fill: no row is ever dropped. On
accelerators `ragged_all_to_all` moves the rows there are. XLA:CPU has no such operation: there all slots are sent, some
P times as many bytes, which costs little between devices of one process.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What is static of an exchange, the same on every device: the mesh axis, P, R and S."""

    axis: str
    devices: int
    rows: int
    slots: int


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def send(x_RD: jax.Array, sent_P: jax.Array, received_P: jax.Array, exchange: Exchange) -> jax.Array:
    """The rows that all devices sent here, [P * S, D]: those of device p from row p * S on, zeros after them.

    Args:
        x_RD: rows; the first sent_P[0] go to device 0 of the axis, and so on. Rows beyond their sum go nowhere.
        sent_P, received_P: int32, rows to and from each device, none above S.
    """
    branches = {"cpu": partial(_send_padded, exchange), "default": partial(_send_ragged, exchange)}
    return jax.lax.platform_dependent(x_RD, sent_P, received_P, **branches)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def give_back(y_SD: jax.Array, sent_P: jax.Array, received_P: jax.Array, exchange: Exchange) -> jax.Array:
    """The way back of a `send` with the same counts: [P * S, D] to [R, D], zeros for rows that went nowhere."""
    branches = {"cpu": partial(_give_back_padded, exchange), "default": partial(_give_back_ragged, exchange)}
    return jax.lax.platform_dependent(y_SD, sent_P, received_P, **branches)


# Each is the other's transpose: what went out there comes back here.
send.defvjp(
    lambda x_RD, sent_P, received_P, exchange: (send(x_RD, sent_P, received_P, exchange), (sent_P, received_P)),
    lambda exchange, counts, dy_SD: (give_back(dy_SD, *counts, exchange), None, None),
)
give_back.defvjp(
    lambda y_SD, sent_P, received_P, exchange: (give_back(y_SD, sent_P, received_P, exchange), (sent_P, received_P)),
    lambda exchange, counts, dx_RD: (send(dx_RD, *counts, exchange), None, None),
)


def _starts(sizes_P: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes_P, dtype=jnp.int32) - sizes_P


def _send_ragged(exchange: Exchange, x_RD: jax.Array, sent_P: jax.Array, received_P: jax.Array) -> jax.Array:
    target_SD = jnp.zeros((exchange.devices * exchange.slots, x_RD.shape[1]), x_RD.dtype)
    # Under `vmap` JAX 0.10 wants all counts and places to depend on what is mapped; hence the zeros.
    place_P = jax.lax.axis_index(exchange.axis) * exchange.slots + 0 * sent_P
    start_P = _starts(sent_P)
    return jax.lax.ragged_all_to_all(x_RD, target_SD, start_P, sent_P, place_P, received_P, axis_name=exchange.axis)


def _give_back_ragged(exchange: Exchange, y_SD: jax.Array, sent_P: jax.Array, received_P: jax.Array) -> jax.Array:
    target_RD = jnp.zeros((exchange.rows, y_SD.shape[1]), y_SD.dtype)
    # Where on each of the others the rows begin that it had sent here.
    place_P = jax.lax.all_to_all(_starts(sent_P), exchange.axis, 0, 0, tiled=True)
    start_P = jnp.arange(exchange.devices, dtype=jnp.int32) * exchange.slots + 0 * sent_P
    return jax.lax.ragged_all_to_all(y_SD, target_RD, start_P, received_P, place_P, sent_P, axis_name=exchange.axis)


def _send_padded(exchange: Exchange, x_RD: jax.Array, sent_P: jax.Array, received_P: jax.Array) -> jax.Array:
    del received_P
    slot_S = jnp.arange(exchange.slots, dtype=jnp.int32)
    is_sent_PS = slot_S < sent_P[:, None]
    row_PS = jnp.where(is_sent_PS, _starts(sent_P)[:, None] + slot_S, 0)
    x_PSD = jnp.where(is_sent_PS[..., None], x_RD[row_PS], 0)
    return jax.lax.all_to_all(x_PSD, exchange.axis, 0, 0).reshape(-1, x_RD.shape[1])


def _give_back_padded(exchange: Exchange, y_SD: jax.Array, sent_P: jax.Array, received_P: jax.Array) -> jax.Array:
    del received_P
    y_PSD = jax.lax.all_to_all(y_SD.reshape(exchange.devices, exchange.slots, -1), exchange.axis, 0, 0)
    row_R = jnp.arange(exchange.rows, dtype=jnp.int32)
    end_P = jnp.cumsum(sent_P, dtype=jnp.int32)
    was_sent_R = row_R < end_P[-1]
    device_R = jnp.where(was_sent_R, jnp.sum(end_P <= row_R[:, None], axis=1, dtype=jnp.int32), 0)
    slot_R = jnp.where(was_sent_R, row_R - _starts(sent_P)[device_R], 0)
    return jnp.where(was_sent_R[:, None], y_PSD[device_R, slot_R], 0)
