"""Pipelines: consecutive layers on consecutive stages, a batch cut into pieces that follow each other through them.

All stages are one program: what they compute in a turn is a `vmap` over the mesh axis `stage`, and passing on is a roll
along it, which becomes a permutation between neighbours (GSPMD: Xu et al. 2021, arXiv:2105.04663). A stage that has no
piece in a turn computes something that nobody reads.

- `run` is GPipe (Huang et al. 2019, arXiv:1811.06965): the backward pass is that of the whole loop, so what it needs of
  every piece is kept. With `rounds` > 1 it is the interleaved order (Narayanan et al. 2021, arXiv:2104.04473): each
  stage holds several groups of layers, a piece goes round as often, and the idle share falls from (S - 1) / M to
  (S - 1) / (rounds * M). Layers rest in order, S groups of them, so here each travels to its stage once a step.
- `run_1f1b` (Narayanan et al. 2019, arXiv:1806.03377) starts a piece's backward pass as soon as its forward pass is
  through: a stage keeps the inputs of at most 2S - 1 pieces, however many there are, and computes its forward pass
  again.

Shapes: L layers, S stages, V rounds, l layers of a group (L = V * S * l), M pieces; b rows of a piece. Where layers
differ, L and l of an array are those layers that have it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .rules import constrain, constrain_parameter

Tree = Any
# (weights [l, ...], x, piece) to x and sums, a tree of arrays [l, ...].
Stage = Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
X_AXES = ("batch", "sequence", "embed")


def cut(tree: Tree, pieces: int) -> Tree:
    """[B, ...] to [M, b, ...]. Piece m takes every M-th row, so that no row leaves its device."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, pieces, *a.shape[1:]), 0, 1), tree)


def join(x_MbTD: jax.Array) -> jax.Array:
    """What `cut` took apart."""
    x = jnp.swapaxes(x_MbTD, 0, 1)
    return x.reshape(-1, *x.shape[2:])


def run(
    stage: Stage, weights_L: Tree, axes: Tree, x_MbTD: jax.Array, pieces_M: Tree, *, stages: int, rounds: int = 1
) -> tuple[jax.Array, Tree]:
    """All pieces through all layers: their results [M, b, T, D], and the sums [L, ...] over the pieces.

    Args:
        stage: what a group of layers does to one piece.
        weights_L: stacked weights [L, ...]. axes: of each, its logical axes without the first.
        x_MbTD: what enters. pieces_M: what else belongs to each piece, [M, ...].
    """
    S, V, M = stages, rounds, len(x_MbTD)
    if V > 1 and M % S:
        raise ValueError(f"The interleaved schedule takes its pieces {S} at a time, one a stage; got {M} pieces.")
    weights_VSl = _groups(weights_L, axes, S, V)
    stage_S = jnp.arange(S)

    def turn(carry: Any, t: jax.Array) -> Any:
        x_SbTD, sums_VSl = carry
        item_S = t - stage_S  # of the V * M pieces of work that each stage has
        busy_S = (item_S >= 0) & (item_S < V * M)
        item_S = jnp.clip(item_S, 0, V * M - 1)
        # S pieces go round V times, then the next S: what leaves the last stage is just what the first one wants.
        round_S = item_S % (S * V) // S
        piece_S = item_S // (S * V) * S + item_S % S if V > 1 else item_S
        entering = jnp.where(round_S[0] == 0, x_MbTD[piece_S[0]], x_SbTD[-1])
        x_SbTD = _pin(jnp.roll(x_SbTD, 1, 0).at[0].set(entering))
        weights_Sl = _of_round(weights_VSl, round_S)
        pieces_S = jax.tree.map(lambda a: a[piece_S], pieces_M)
        x_SbTD, sums_Sl = _over_stages(stage)(weights_Sl, x_SbTD, pieces_S)
        sums_VSl = jax.tree.map(
            lambda total, new: total.at[round_S, stage_S].add(_where(busy_S, new)), sums_VSl, sums_Sl
        )
        x_SbTD = _pin(x_SbTD)
        return (x_SbTD, sums_VSl), x_SbTD

    start = _pin(jnp.zeros((S, *x_MbTD.shape[1:]), x_MbTD.dtype))
    weights_Sl, pieces_S = _of_round(weights_VSl, 0 * stage_S), jax.tree.map(lambda a: a[0 * stage_S], pieces_M)
    like = jax.eval_shape(_over_stages(stage), weights_Sl, start, pieces_S)[1]
    sums_VSl = jax.tree.map(lambda a: jnp.zeros((V, *a.shape), a.dtype), like)
    (_, sums_VSl), y_NSbTD = jax.lax.scan(turn, (start, sums_VSl), jnp.arange(V * M + S - 1))
    m = jnp.arange(M)
    last = (m // S * S * V + (V - 1) * S + m % S if V > 1 else m) + S - 1  # the turn in which a piece leaves
    return y_NSbTD[last, S - 1], jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), sums_VSl)


def run_1f1b(
    first: Callable[[Tree, Tree], jax.Array],
    stage: Stage,
    last: Callable[[Tree, jax.Array, Tree], Tree],
    outside: Tree,
    weights_L: Tree,
    axes: Tree,
    pieces_M: Tree,
    penalty: Callable[[Tree], jax.Array] | None = None,
    *,
    stages: int,
) -> tuple[Tree, Tree, Tree, Tree]:
    """Loss and gradients of all pieces, each backward pass begun as soon as it can.

    Args:
        first: (outside, piece) to what enters the first stage. stage: as in `run`.
        last: (outside, x, piece) to (loss, others), sums over the piece; it is not asked for pieces that are not there,
            but must be finite for any x.
        outside: the weights of `first` and `last`. weights_L, axes, pieces_M: as in `run`.
        penalty: the part of the objective that depends, linearly, on the sums [L, ...] that stages return. Not part of
            the loss that is returned, but of the gradients.

    Returns:
        `((loss, others), sums_L, gradients of outside, gradients of weights_L)`.
    """
    S, M = stages, len(jax.tree.leaves(pieces_M)[0])
    weights_VSl = _groups(weights_L, axes, S, 1)
    weights_Sl = jax.tree.map(lambda a: a[0], weights_VSl)
    stage_S = jnp.arange(S)
    kept = 2 * S - 1
    delay_S = 2 * (S - 1 - stage_S)  # turns between a piece's forward and backward pass

    def take(index: jax.Array) -> tuple[Tree, jax.Array]:
        there = (index >= 0) & (index < M)
        return jax.tree.map(lambda a: a[jnp.clip(index, 0, M - 1)], pieces_M), there

    def backward(weights_l: Tree, x: jax.Array, piece: Tree, dy: jax.Array, dsums: Tree) -> Any:
        def outputs(weights_l: Tree, x: jax.Array) -> Any:
            y, sums = stage(weights_l, x, piece)
            return y, _real(sums)

        return jax.vjp(outputs, weights_l, x)[1]((dy, dsums))

    def turn(carry: Any, t: jax.Array) -> Any:
        y_SbTD, kept_SNbTD, dx_SbTD, found, sums_Sl, doutside, dweights_Sl = carry
        entering, _ = take(t)
        x_SbTD = _pin(jnp.roll(y_SbTD, 1, 0).at[0].set(first(outside, entering)))
        kept_SNbTD = jax.lax.dynamic_update_index_in_dim(kept_SNbTD, x_SbTD, t % kept, 1)
        pieces_S, there_S = take(t - stage_S)
        y_SbTD, new_Sl = _over_stages(stage)(weights_Sl, x_SbTD, pieces_S)
        y_SbTD = _pin(y_SbTD)
        sums_Sl = jax.tree.map(lambda total, new: total + _where(there_S, new), sums_Sl, new_Sl)

        leaving, there = take(t - (S - 1))
        values, pull, others = jax.vjp(lambda w, y: last(w, y, leaving), outside, y_SbTD[-1], has_aux=True)
        dlast, dy = pull(there.astype(values.dtype))
        found = jax.tree.map(lambda total, new: total + _where(there, new), found, (values, others))

        dy_SbTD = _pin(jnp.roll(dx_SbTD, -1, 0).at[-1].set(dy.astype(dx_SbTD.dtype)))
        pieces_S, there_S = take(t - delay_S - stage_S)
        old_SbTD = _pin(jax.vmap(lambda a, i: a[i])(kept_SNbTD, (t - delay_S) % kept))
        dweights, dx_SbTD = _over_stages(backward)(
            weights_Sl, old_SbTD, pieces_S, _where(there_S, dy_SbTD), _where(there_S, dsums_Sl)
        )
        dx_SbTD = _pin(dx_SbTD)
        left, there = take(t - 2 * (S - 1))
        dfirst = jax.vjp(lambda w: first(w, left), outside)[1](_where(there, dx_SbTD[0]))[0]
        doutside = jax.tree.map(lambda total, a, b: total + a + b, doutside, dlast, dfirst)
        dweights_Sl = jax.tree.map(jnp.add, dweights_Sl, dweights)
        return (y_SbTD, kept_SNbTD, dx_SbTD, found, sums_Sl, doutside, dweights_Sl), None

    some = jax.tree.map(lambda a: a[0], pieces_M)
    x = jax.eval_shape(first, outside, some)
    start = _pin(jnp.zeros((S, *x.shape), x.dtype))
    pieces_S = jax.tree.map(lambda a: a[0 * stage_S], pieces_M)
    like = jax.eval_shape(_over_stages(stage), weights_Sl, start, pieces_S)
    sums_L = jax.tree.map(lambda a: jnp.zeros((S * a.shape[1], *a.shape[2:]), a.dtype), like[1])
    if penalty is None:
        dsums_L = jax.tree.map(jnp.zeros_like, _real(sums_L))
    else:
        dsums_L = _real(jax.grad(penalty, allow_int=True)(sums_L))
    dsums_Sl = [a.reshape(S, -1, *a.shape[1:]) for a in dsums_L]
    found = jax.eval_shape(last, outside, x, some)
    kept_SNbTD = constrain(jnp.zeros((S, kept, *x.shape), x.dtype), ("stage", None, *X_AXES))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (found, like[1], outside, weights_Sl))
    carry = (start, kept_SNbTD, start, *zeros)
    carry, _ = jax.lax.scan(turn, carry, jnp.arange(M + 2 * (S - 1)))
    _, _, _, found, sums_Sl, doutside, dweights_Sl = carry
    sums_L, dweights_L = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (sums_Sl, dweights_Sl))
    return found, sums_L, doutside, dweights_L


def _groups(weights_L: Tree, axes: Tree, S: int, V: int) -> Tree:
    """Weights [L, ...] as [V, S, l, ...], each stage's on its devices."""

    def group(a: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        if rest := len(a) % (S * V):
            raise ValueError(f"Layers must divide by stage x rounds = {S * V}; {rest} are left over of {len(a)}.")
        return constrain_parameter(a.reshape(V, S, -1, *a.shape[1:]), (None, "layers", None, *names))

    return jax.tree.map(group, weights_L, axes)


def _real(tree: Tree) -> list[jax.Array]:
    """The leaves that can have a gradient: counts have none."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _of_round(weights_VSl: Tree, round_S: jax.Array) -> Tree:
    """Each stage's weights of the round that it is in."""
    if len(jax.tree.leaves(weights_VSl)[0]) == 1:
        return jax.tree.map(lambda a: a[0], weights_VSl)
    return jax.tree.map(lambda a: jax.vmap(lambda one, v: one[v], in_axes=(1, 0))(a, round_S), weights_VSl)


def _over_stages(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(function, spmd_axis_name="stage")


def _pin(x_SbTD: jax.Array) -> jax.Array:
    return constrain(x_SbTD, ("stage", *X_AXES))


def _where(keep: jax.Array, tree: Tree) -> Tree:
    """Zero where `keep`, whose axes are the first ones, is False."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(keep, range(keep.ndim, x.ndim)), x, 0), tree)
