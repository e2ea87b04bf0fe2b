"""Sampling on the device.

Shapes: R rows of the batch, S slots, V vocabulary, N stop tokens kept a slot, W words of 32 tokens' bits, ceil(V / 32);
the vocabulary as G groups of B tokens, ceil(V / B).

Invariants:
- a row's token depends on that row alone: a branch that another row switches on leaves it as it was, bit by bit;
- randomness is keyed by (seed, position of the token), so a seed means the same in any batch, slot or replay;
- filters need no sort. A token is drawn before them. Where they leave it out they leave out all that is less likely
  too, and one is drawn among the others (as FlashInfer does), so that few draws will do. Tokens exactly as likely as
  the last one kept are kept too;
- what is cheap for a group of tokens is not done for each of them: a draw takes a group and then one of its tokens, as
  do maxima.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MAX_TOP = 20  # likeliest tokens reported at most, as in OpenAI's API
MAX_BIAS = 1024  # entries of logit_bias a request may have
MAX_STOPS = 80  # end-of-sequence and stop tokens that min_tokens can hold back
GROUP = 128  # tokens
FEW = 64  # the largest top_k whose last token is found without bisection
LARGEST = 1e38  # a logit after penalties, so that differences of two are finite
DRAWS = 64  # noise of so many for each token is not the next token's
# What a row switches on.
LOGPROBS, PENALTIES, BIAS, HOLD_STOPS, GRAMMAR = 1, 2, 4, 8, 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["last_token_S", "seen_SV", "counts_SV", "bias_SV", "stops_SN"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What sampling keeps on the device for each slot between steps.

    Attributes:
        last_token_S: int32; the token sampled last, so that the next step need not wait for the host to see it.
        seen_SV: bool; tokens of the prompt, and those that were there when the slot was set up (repetition penalty).
        counts_SV: int32; how often each token was generated since then.
        bias_SV: float32; logit_bias.
        stops_SN: int32; tokens that min_tokens holds back, padded with V.
    """

    last_token_S: jax.Array
    seen_SV: jax.Array
    counts_SV: jax.Array
    bias_SV: jax.Array
    stops_SN: jax.Array

    @classmethod
    def empty(cls, slots: int, vocab_size: int) -> "SlotState":
        return cls(
            jnp.zeros((slots,), jnp.int32),
            jnp.zeros((slots, vocab_size), bool),
            jnp.zeros((slots, vocab_size), jnp.int32),
            jnp.zeros((slots, vocab_size), jnp.float32),
            jnp.full((slots, MAX_STOPS), vocab_size, jnp.int32),
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "slot", "flags", "position", "seed_high", "seed_low", "top_k",
        "temperature", "top_p", "min_p", "repetition", "presence", "frequency",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Parameters of each row, all [R]; int32, and float32 from `temperature` on. `position`: of the token sampled."""

    slot: jax.Array
    flags: jax.Array
    position: jax.Array
    seed_high: jax.Array
    seed_low: jax.Array
    top_k: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array

    def has(self, flag: int) -> jax.Array:
        return (self.flags & flag) != 0


def record_tokens(
    state: SlotState, rows: SamplingRows, token_T: jax.Array, slot_T: jax.Array, generated_T: jax.Array
) -> SlotState:
    """Counts the tokens that a step feeds, for the penalties. `slot_T` is S or more for tokens not to be counted."""

    def count(state: SlotState) -> SlotState:
        slots = state.last_token_S.shape[0]
        seen = state.seen_SV.at[jnp.where(generated_T, slots, slot_T), token_T].set(True, mode="drop")
        counts = state.counts_SV.at[jnp.where(generated_T, slot_T, slots), token_T].add(1, mode="drop")
        return dataclasses.replace(state, seen_SV=seen, counts_SV=counts)

    return lax.cond(jnp.any(rows.has(PENALTIES)), count, lambda state: state, state)


def setup_slot(
    state: SlotState,
    slot: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
    stops_N: jax.Array,
    seen_V: jax.Array,
) -> SlotState:
    """Gives a slot its logit bias ([MAX_BIAS] ids, padded with V, and values), held-back stop tokens, and the tokens
    that its request has behind it already. What was counted for the one before is forgotten."""
    row = jnp.zeros(state.bias_SV.shape[1:], jnp.float32).at[bias_ids].add(bias_values, mode="drop")
    return dataclasses.replace(
        state,
        seen_SV=state.seen_SV.at[slot].set(seen_V),
        counts_SV=state.counts_SV.at[slot].set(0),
        bias_SV=state.bias_SV.at[slot].set(row),
        stops_SN=state.stops_SN.at[slot].set(stops_N),
    )


def ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that compare as the float32 `x` do."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _last_of_many(x_RV: jax.Array, count_R: jax.Array) -> jax.Array:
    """The count-th largest number of each row, [R, 1]: by bisection over ordered bits."""
    bits_RV = ordered_bits(x_RV)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # so many numbers are not below `low`, but fewer not below `high`
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        holds = jnp.sum(bits_RV >= middle[:, None], axis=-1) >= count_R
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = jnp.full(len(x_RV), jnp.iinfo(jnp.int32).min)
    high = jnp.full(len(x_RV), jnp.iinfo(jnp.int32).max)
    bits_R1 = lax.fori_loop(0, 32, halve, (low, high))[0][:, None]
    return lax.bitcast_convert_type(bits_R1 ^ ((bits_R1 >> 31) & 0x7FFFFFFF), jnp.float32)


def _penalised(logits_RV: jax.Array, rows: SamplingRows, state: SlotState) -> jax.Array:
    counts = state.counts_SV[rows.slot]
    met = state.seen_SV[rows.slot] | (counts > 0)
    repetition = rows.repetition[:, None]
    out = jnp.where(met, jnp.where(logits_RV > 0, logits_RV / repetition, logits_RV * repetition), logits_RV)
    out = out - rows.frequency[:, None] * counts - rows.presence[:, None] * (counts > 0)
    # A penalty may be so small that what is divided by it would be infinite, and differences of two such ones nan.
    out = jnp.clip(out, -LARGEST, LARGEST)
    return jnp.where(rows.has(PENALTIES)[:, None], out, logits_RV)


def _biased(logits_RV: jax.Array, rows: SamplingRows, state: SlotState) -> jax.Array:
    out = jnp.where(rows.has(BIAS)[:, None], logits_RV + state.bias_SV[rows.slot], logits_RV)
    row = jnp.arange(out.shape[0])[:, None]
    held = out.at[row, state.stops_SN[rows.slot]].set(-jnp.inf, mode="drop")
    return jnp.where(rows.has(HOLD_STOPS)[:, None], held, out)


def mask_words(vocab_size: int) -> int:
    """W."""
    return -(-vocab_size // 32)


def _allowed(logits_RV: jax.Array, rows: SamplingRows, allowed_RW: jax.Array) -> jax.Array:
    bits = (allowed_RW[:, :, None] >> jnp.arange(32)) & 1
    allowed_RV = bits.reshape(len(allowed_RW), -1)[:, : logits_RV.shape[1]] == 1
    return jnp.where(allowed_RV | ~rows.has(GRAMMAR)[:, None], logits_RV, -jnp.inf)


def _groups(x_RV: jax.Array, value: float) -> jax.Array:
    """[R, G, B], the last one filled up with `value`."""
    rows, vocab_size = x_RV.shape
    x_RV = jnp.pad(x_RV, ((0, 0), (0, -vocab_size % GROUP)), constant_values=value)
    return x_RV.reshape(rows, -1, GROUP)


def _chosen(x_RGB: jax.Array, group_RN: jax.Array) -> jax.Array:
    """[R, N, B]."""
    return jnp.take_along_axis(x_RGB, group_RN[:, :, None], axis=1)


def likeliest(logits_RV: jax.Array) -> jax.Array:
    """`argmax` over the vocabulary: the first of the largest, int32 [R]."""
    x_RGB = _groups(logits_RV, -jnp.inf)
    group_R = jnp.argmax(jnp.max(x_RGB, axis=-1), axis=-1)
    token_R = jnp.argmax(_chosen(x_RGB, group_R[:, None])[:, 0], axis=-1)
    return (group_R * GROUP + token_R).astype(jnp.int32)


def top_tokens(logits_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`: the largest [R, count], of equal ones the first, and which these are. None is nan."""
    x_RGB = _groups(logits_RV, -jnp.inf)
    if x_RGB.shape[1] <= count:
        return lax.top_k(logits_RV, count)
    # As many groups as tokens are sure to have them all; in order, so that equal ones stay in theirs.
    group_RN = jnp.sort(lax.top_k(jnp.max(x_RGB, axis=-1), count)[1], axis=-1)
    top, at = lax.top_k(_chosen(x_RGB, group_RN).reshape(len(logits_RV), -1), count)
    return top, jnp.take_along_axis(group_RN, at // GROUP, axis=1) * GROUP + at % GROUP


def _draw(x_RV: jax.Array, rows: SamplingRows, wanted_R: jax.Array) -> jax.Array:
    """A token of each row where `wanted_R`, by the probabilities exp(x) among what the row's filters keep: top-k, of
    that top-p (Holtzman et al., 2020), of that min-p (Nguyen et al., 2024).

    The largest of each row of `x_RV` is 0.
    """
    count, vocab_size = x_RV.shape
    few = (rows.top_k > 0) & (rows.top_k <= FEW)
    many = (rows.top_k > FEW) & (rows.top_k < vocab_size)

    def last_of_few() -> jax.Array:
        top = top_tokens(x_RV, min(FEW, vocab_size))[0]
        return jnp.take_along_axis(top, jnp.clip(rows.top_k - 1, 0, top.shape[1] - 1)[:, None], axis=1)

    all_R1 = jnp.full((count, 1), -jnp.inf)
    few_R1 = lax.cond(jnp.any(few), last_of_few, lambda: all_R1)
    many_R1 = lax.cond(jnp.any(many), lambda: _last_of_many(x_RV, rows.top_k), lambda: all_R1)
    last_R1 = jnp.where(few[:, None], few_R1, jnp.where(many[:, None], many_R1, -jnp.inf))
    weight_RV = jnp.where(x_RV >= last_R1, jnp.exp(x_RV), 0.0)
    before_last = jnp.where(rows.top_p < 1, rows.top_p * jnp.sum(weight_RV, axis=-1), jnp.inf)
    least_R1 = jnp.minimum(jnp.log(rows.min_p), 0)[:, None]

    def again(carry: Any) -> Any:
        nth, token_R, missing_R, out_R1 = carry
        weight_RGB = _groups(jnp.where(x_RV > out_R1, weight_RV, 0.0), 0.0)
        weight_RG = jnp.sum(weight_RGB, axis=-1)
        noise = _noise(rows, nth, weight_RG.shape[1] + GROUP)
        group_R = jnp.argmax(weight_RG / noise[:, :-GROUP], axis=-1)
        inside_RB = _chosen(weight_RGB, group_R[:, None])[:, 0]
        new_R = group_R * GROUP + jnp.argmax(inside_RB / noise[:, -GROUP:], axis=-1)
        new_x_R1 = jnp.take_along_axis(x_RV, new_R[:, None], axis=1)
        before_R = lax.cond(
            jnp.any(missing_R & (rows.top_p < 1)),
            lambda: jnp.sum(jnp.where(x_RV > new_x_R1, weight_RV, 0.0), axis=-1),
            lambda: jnp.zeros(count),
        )
        # Nothing leaves out the likeliest, so this ends; where no token has a weight, at once.
        is_out = ((before_R > 0) & (before_R >= before_last)) | (new_x_R1 < least_R1)[:, 0]
        is_out &= jnp.max(weight_RG, axis=-1) > 0
        out_R1 = jnp.where(is_out[:, None], new_x_R1, out_R1)
        return nth + 1, jnp.where(missing_R, new_R, token_R), missing_R & is_out, out_R1

    start = jnp.int32(0), jnp.zeros(count, jnp.int32), wanted_R, all_R1
    return lax.while_loop(lambda carry: jnp.any(carry[2]), again, start)[1]


def _noise(rows: SamplingRows, nth: Any, count: int) -> jax.Array:
    """[R, count] for the nth draw of each row's token: a choice with the largest weight / noise is one by weights."""

    def one(high: jax.Array, low: jax.Array, position: jax.Array) -> jax.Array:
        words = lax.bitcast_convert_type(jnp.stack([high, low]), jnp.uint32)
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        noise = jax.random.exponential(jax.random.fold_in(key, position * DRAWS + nth), (count,), jnp.float32)
        return jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)

    return jax.vmap(one)(rows.seed_high, rows.seed_low, rows.position)


def sample(logits_RV: jax.Array, rows: SamplingRows, state: SlotState, allowed_RW: jax.Array) -> jax.Array:
    """Draws a token for every row: int32 [R]; -1 where the model's logits are not finite.

    `allowed_RW` (int32) has a bit for each token, the lowest first; rows with GRAMMAR draw from those that are set, of
    which there must be one.
    """
    finite = jnp.all(jnp.isfinite(logits_RV), axis=-1)
    random = rows.temperature > 0

    def changed(logits: jax.Array) -> jax.Array:
        logits = lax.cond(jnp.any(rows.has(PENALTIES)), lambda x: _penalised(x, rows, state), lambda x: x, logits)
        logits = lax.cond(jnp.any(rows.has(BIAS | HOLD_STOPS)), lambda x: _biased(x, rows, state), lambda x: x, logits)
        # Last, so that no bias brings back what a grammar leaves out.
        return lax.cond(jnp.any(rows.has(GRAMMAR)), lambda x: _allowed(x, rows, allowed_RW), lambda x: x, logits)

    logits = logits_RV.astype(jnp.float32)
    is_changed = jnp.any(rows.has(PENALTIES | BIAS | HOLD_STOPS | GRAMMAR))
    logits = lax.cond(is_changed, changed, lambda x: x, logits)
    best_R = likeliest(logits)

    def draw() -> jax.Array:
        # The likeliest token sits at 0 before the division, so that a tiny temperature pushes the others to -inf and
        # not it to infinity.
        top = jnp.take_along_axis(logits, best_R[:, None], axis=-1)
        scaled = (logits - top) / jnp.where(random, rows.temperature, 1.0)[:, None]
        return jnp.where(random, _draw(scaled, rows, random & finite), best_R)

    return jnp.where(finite, lax.cond(jnp.any(random), draw, lambda: best_R), -1)


def top_logprobs(logits_RV: jax.Array, token_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The model's own log-probabilities, before any penalty, grammar or temperature: the trainer's numbers.

    Returns float32 [R] of `token_R`, int32 [R, n] of the likeliest tokens and float32 [R, n] of theirs; n is MAX_TOP
    or V.
    """
    logits = logits_RV.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(token_R, 0)[:, None], axis=-1)
    top, ids = top_tokens(logits, min(MAX_TOP, logits.shape[-1]))
    return (chosen - normaliser)[:, 0], ids.astype(jnp.int32), top - normaliser
