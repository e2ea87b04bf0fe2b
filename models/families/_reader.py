"""Reading config.json strictly: every key is taken, allowed at one value, known to be harmless, or refused by name."""

import math
from collections.abc import Iterable
from typing import Any

from ...layers.plain import fits, is_wide
from ...layers.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    Scaling,
    YarnScaling,
)
from ..config import MAX_LAYERS, LayerKind

# Keys that describe, or act only outside of the forward pass: they cannot change a logit. The token ids are kept in
# generation_config.json and the tokenizer's files.
WITHOUT_EFFECT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "id2label", "label2id",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "is_encoder_decoder", "_attn_implementation", "_attn_implementation_autoset", "auto_map", "cache_implementation",
    "attn_implementation", "return_dict_in_generate", "task_specific_params",
}  # fmt: skip
# Keys of every family that would change the numbers, accepted at the values that do not.
ONLY: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,),
    "attention_dropout": (0, 0.0),
    "is_decoder": (True, False),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Our name -> Hugging Face's, of what most families call alike.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What keys hold whose default does not tell.
KINDS: dict[str, type] = {
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), str),
    **dict.fromkeys(("layer_types", "no_rope_layers"), list),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), dict),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "query_pre_attn_scalar"), float),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), float),
    **dict.fromkeys(("head_dim", "num_key_value_heads", "n_inner", "sliding_window", "q_lora_rank"), int),
    **dict.fromkeys(("n_group", "topk_group", "num_experts", "original_max_position_embeddings"), int),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "num_local_experts"), int),
}
ROPE_KINDS: dict[str, type] = {
    **dict.fromkeys(("rope_type", "type"), str),
    **dict.fromkeys(("short_factor", "long_factor"), list),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), float),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "rope_theta", "partial_rotary_factor"), float),
    "original_max_position_embeddings": int,
    "truncate": bool,
}
# Where null means something, whatever the default is: that there is none of it, or that another key decides.
NULLABLE = {
    "sliding_window", "q_lora_rank", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta",
    "partial_rotary_factor", "num_key_value_heads",
}  # fmt: skip
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list",
    dict: "an object of keys and values",
}
_REQUIRED = object()


def check_kind(key: str, value: Any, kind: type | None) -> None:
    """ValueError where `value` is no `kind`; a whole number will do for a number, which is finite."""
    if kind is not None and not (fits(value, kind) and (kind is not float or math.isfinite(value))):
        at_most = ", of 64 bits at most" if is_wide(value) else ""
        raise ValueError(f"{key} is {WORDS[kind]}{at_most}; config.json has {value!r}.")


class Reader:
    """The keys of one config.json, each to be taken once; `finish` refuses what is left.

    Args:
        family: its model_type. defaults: what transformers takes for keys that are missing.
    """

    def __init__(self, family: str, config: dict[str, Any], defaults: dict[str, Any] | None = None):
        if config.get("model_type", family) != family:
            raise ValueError(f"This is the family {family!r}; config.json says model_type={config['model_type']!r}.")
        self.family, self._config, self._defaults = family, config, defaults or {}
        self._left = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT}
        self._refused: list[str] = []

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`, or its default; ValueError where there is neither."""
        self._left.pop(key, None)
        usual = self._defaults.get(key, default)
        if key not in self._config:
            if usual is _REQUIRED:
                raise ValueError(f"config.json has no {key}, which the family {self.family!r} needs.")
            return usual
        value, known = self._config[key], usual is not None and usual is not _REQUIRED
        kind = KINDS.get(key, type(usual) if known else None)
        if value is None:
            if usual is not None and key not in NULLABLE:
                says = f"; leave it out for {usual!r}" if known else ""
                raise ValueError(f"{key} is {WORDS[kind] if kind else 'a value'}; config.json has null{says}.")
        else:
            check_kind(key, value, kind)
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> Any:
        """`take` of what is divided by, or whose root is."""
        value = self.take(key, default)
        if not value > 0:
            raise ValueError(f"{key} is more than 0; config.json has {value!r}.")
        return value

    def sizes(self, **names: str) -> dict[str, Any]:
        """What `SIZES` lists, by our names; `names` are other spellings."""
        names = {**SIZES, **names}
        sizes = {ours: self.take(theirs) for ours, theirs in names.items()}
        # Before families list their layers' kinds.
        if sizes["num_layers"] > MAX_LAYERS:
            raise ValueError(
                f"{names['num_layers']} is at most {MAX_LAYERS:,}; config.json has {sizes['num_layers']}."
            )
        return sizes

    def heads(self, hidden_size: int, heads: int) -> dict[str, int]:
        """num_kv_heads and head_dim, which have defaults of their own."""
        kv_heads, head_dim = self.take("num_key_value_heads", None), self.take("head_dim", None)
        if head_dim is None and (heads < 1 or hidden_size % heads):
            raise ValueError(f"hidden_size={hidden_size} does not divide by num_attention_heads={heads}.")
        return {
            "num_kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": hidden_size // heads if head_dim is None else head_dim,
        }

    def activation(self, *keys: str) -> str:
        """Ours for the first of `keys` that says one."""
        found = [value for key in keys if (value := self.take(key, None)) is not None]
        if not found or found[0] not in ACTIVATIONS:
            raise ValueError(f"{keys[0]} is one of {', '.join(ACTIVATIONS)}; config.json has {found or None}.")
        return ACTIVATIONS[found[0]]

    def only(self, key: str, *allowed: Any) -> None:
        """`key` may be missing or have one of these values."""
        value = self._left.pop(key, allowed[0])
        if value not in allowed:
            self._refused.append(f"{key}={value!r} (only {' or '.join(map(repr, allowed))})")

    def ignore(self, *keys: str) -> None:
        """Keys that provably change no logit of this family."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """ValueError that lists every key that is not understood."""
        for key, allowed in ONLY.items():
            self.only(key, *allowed)
        refused = self._refused + [f"{key}={value!r} (unknown key)" for key, value in self._left.items()]
        if refused:
            raise ValueError(
                f"config.json has keys that Twinax does not know to be harmless for {self.family}: "
                f"{'; '.join(refused)}. Remove those that you know change nothing, or ask for support."
            )

    # -- layers ---------------------------------------------------------------------------------------------------

    def layer_types(
        self, count: int, default: Iterable[str], known: tuple[str, ...] = ("full_attention", "sliding_attention")
    ) -> list[str]:
        """One of `known` for each layer."""
        types = self.take("layer_types", None)
        types = list(default) if types is None else types
        if len(types) != count or any(one not in known for one in types):
            raise ValueError(f"layer_types has one of {' and '.join(known)} for each of {count} layers; got {types}.")
        return types

    # -- rope -----------------------------------------------------------------------------------------------------

    def rope(self, head_dim: int, context: int, theta: float = 10000.0, parts: bool = False) -> RopeConfig:
        """Reads transformers 4's `rope_theta` and `rope_scaling`, and 5's `rope_parameters`.

        Args:
            context: max_position_embeddings. theta: the default base.
            parts: whether the family turns a part of each head where `partial_rotary_factor` says so.
        """
        scaling, parameters = self.take("rope_scaling", None) or {}, self.take("rope_parameters", None) or {}
        outer = {key: self.take(key) for key in ("rope_theta", "partial_rotary_factor") if key in self._config}
        outer_context = self.take("original_max_position_embeddings", None)
        given = {**scaling, **parameters}
        for key, value in outer.items():
            if value is not None and given.setdefault(key, value) != value:
                raise ValueError(f"config.json gives two values of {key}: {value} and {given[key]}. Keep one.")
        return self._rope(given, head_dim, context, theta, outer_context, parts)

    def ropes(self, head_dim: int, context: int, theta: float, local: float) -> tuple[RopeConfig, RopeConfig]:
        """Of full and of sliding attention, which have their own: 4's `rope_local_base_freq`, 5's nested parameters."""
        parameters = self.take("rope_parameters", None) or {}
        if set(parameters) & {"full_attention", "sliding_attention"}:
            self.ignore("rope_theta", "rope_scaling", "rope_local_base_freq")
            full, sliding = (parameters.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
            return self._rope(full, head_dim, context, theta), self._rope(sliding, head_dim, context, local)
        sliding = self._rope({"rope_theta": self.take("rope_local_base_freq", local)}, head_dim, context, local)
        return self.rope(head_dim, context, theta), sliding

    def _rope(
        self,
        given: dict[str, Any],
        head_dim: int,
        context: int,
        theta: float,
        outer_context: int | None = None,
        parts: bool = False,
    ) -> RopeConfig:
        check_kind("rope_parameters", given, dict)
        given = dict(given)
        for key, value in given.items():
            if value is not None:
                check_kind(key, value, ROPE_KINDS.get(key))
            if ROPE_KINDS.get(key) is list:
                for one in value or ():
                    check_kind(f"each of {key}", one, float)
        kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
        theta = float(given.pop("rope_theta", None) or theta)
        partial = given.pop("partial_rotary_factor", None)
        size = None if partial in (None, 1.0) else int(head_dim * partial)
        if size is not None and not parts:
            raise ValueError(
                f"config.json has partial_rotary_factor={partial}, and transformers' {self.family} turns whole heads "
                "whatever that key says: what is meant is not known. Remove the key if whole heads are turned."
            )
        if len(kinds) > 1:
            raise ValueError(f"config.json gives two types of rope: {' and '.join(sorted(map(str, kinds)))}. Keep one.")
        kind = kinds.pop() if kinds else "default"
        if kind == "default":
            given = {} if given.get("factor") in (None, 1.0) and set(given) <= {"factor"} else given
            if given:
                raise ValueError(f"Rope of type 'default' takes no further keys; config.json has {sorted(given)}.")
            return RopeConfig(theta, None, size)
        return RopeConfig(theta, _scaling("longrope" if kind == "su" else kind, given, context, outer_context), size)


def _scaling(kind: str, given: dict[str, Any], context: int, outer_context: int | None) -> Scaling:
    def need(required: set[str], optional: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
        there = {key for key, value in given.items() if value is not None}
        unknown, missing = sorted(set(given) - required - optional), sorted(required - there)
        if unknown or missing:
            raise ValueError(
                f"Rope scaling of type {kind!r} has the keys {sorted(required | optional)}; unknown in config.json: "
                f"{unknown}, missing: {missing}."
            )
        return {key: value for key, value in given.items() if value is not None}

    original = "original_max_position_embeddings"
    match kind:
        case "linear":
            return LinearScaling(float(need({"factor"})["factor"]))
        case "dynamic":
            need({"factor"}, {original})  # transformers takes max_position_embeddings, whatever the other says
            return DynamicScaling(float(given["factor"]), context)
        case "llama3":
            need({"factor", "low_freq_factor", "high_freq_factor", original})
            return Llama3Scaling(
                factor=float(given["factor"]),
                low_frequency_factor=float(given["low_freq_factor"]),
                high_frequency_factor=float(given["high_freq_factor"]),
                original_context=int(given[original]),
            )
        case "yarn":
            optional = {original, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
            found = need({"factor"}, optional)
            factor = float(found["factor"])
            return YarnScaling(
                factor=factor,
                original_context=int(found.get(original) or outer_context or context),
                beta_fast=float(found.get("beta_fast") or 32),
                beta_slow=float(found.get("beta_slow") or 1),
                truncate=bool(found.get("truncate", True)),
                attention_factor=_yarn_attention(factor, found),
                mscale_all_dim=float(found.get("mscale_all_dim") or 0),
            )
        case "longrope":
            found = need({"short_factor", "long_factor"}, {"factor", "attention_factor", original})
            trained = int(outer_context or found.get(original) or context)
            if trained < 2:
                raise ValueError(f"{original} is at least 2; config.json has {trained}.")
            factor = found.get("factor") or context / trained
            attention = found.get("attention_factor")
            if attention is None:
                attention = 1.0 if factor <= 1 else (1 + math.log(factor) / math.log(trained)) ** 0.5
            short, long = (tuple(map(float, found[f"{which}_factor"])) for which in ("short", "long"))
            return LongRopeScaling(short, long, trained, float(attention))
    raise ValueError(
        f"Rope scaling of type {kind!r} is not supported; 'default', 'linear', 'dynamic', 'llama3', 'yarn' and "
        "'longrope' are."
    )


def _yarn_attention(factor: float, given: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by, as transformers infers it."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def write_rope(rope: RopeConfig, head_dim: int, parts: bool = False) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and, with `parts`, `partial_rotary_factor`: as transformers 4 spells them.

    Raises ValueError where a part of each head is turned, and the family of transformers turns whole heads.
    """
    if rope.size is not None and not parts:
        raise ValueError(
            f"The model turns {rope.size} of a head's {head_dim} numbers, and transformers turns whole heads of its "
            "family. It stays a Twinax checkpoint; family=phi3 can be exported."
        )
    found: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": _write_scaling(rope.scaling)}
    return found if rope.size is None else {**found, "partial_rotary_factor": rope.size / head_dim}


def _write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    original = "original_max_position_embeddings"
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                original: scaling.original_context,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                original: scaling.original_context,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
                **({"mscale_all_dim": scaling.mscale_all_dim} if scaling.mscale_all_dim else {}),
            }
        case LongRopeScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                original: scaling.original_context,
                "attention_factor": scaling.attention_factor,
            }


def write_sizes(config: Any, **names: str) -> dict[str, Any]:
    """The keys of `Reader.sizes` and `Reader.heads`, back."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in {**SIZES, **names}.items()}
    return {**sizes, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}


def pattern_of(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that repeated gives the kinds of all layers."""
    count = len(kinds)
    if not count:
        raise ValueError("num_hidden_layers is at least 1; config.json has none.")
    period = next(p for p in range(1, count + 1) if all(kinds[i] == kinds[i % p] for i in range(count)))
    return tuple(kinds[:period])
