"""What a decoder is made of. No JAX here, so that a config can be read, checked and printed anywhere."""

import dataclasses
import json
import math
from typing import Any

from ..layers import plain
from ..layers.mixer_config import LatentAttentionConfig, LightningConfig, Mamba2Config
from ..layers.moe_config import MoEConfig
from ..layers.quantization_config import Quantization, keeps_dtype
from ..layers.rope_config import RopeConfig, YarnScaling

# Far above any model's, and below what a list of them would cost.
MAX_LAYERS = 10_000
ROPES = ("rope", "local_rope")
# Mixers that keep a state for each request, and the field of the config with their sizes.
RECURRENT = {"mamba2": "mamba2", "lightning_attention": "lightning"}
MIXERS = ("attention", "latent_attention", *RECURRENT)
FEED_FORWARDS = ("mlp", "moe")
CHOICES = {
    "norm": ("rms", "rms_offset", "layer"),
    "norm_placement": ("before", "after", "both", "residual"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "qk_norm": (None, "head", "all"),
    "layer_rope": ("rope", "local_rope", None),
    "mixer": MIXERS,
    "feed_forward": ("default", "mlp", None),
}


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
        window: tokens that attention sees, the token's own the last; None: all before it.
        rope: the field of the config whose rotary embedding it takes, "rope" or "local_rope"; None: it takes none.
        mixer: what mixes tokens, a file of `layers/mixers`.
        feed_forward: "default": the model's mixture of experts, or an MLP in a model without one; "mlp"; None: none.
        mixer_scales, feed_forward_scales: the residual stream and what is added to it are multiplied by these two.
    """

    window: int | None = None
    rope: str | None = "rope"
    mixer: str = "attention"
    feed_forward: str | None = "default"
    mixer_scales: tuple[float, float] = (1.0, 1.0)
    feed_forward_scales: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for field in ("mixer_scales", "feed_forward_scales"):
            scales = tuple(getattr(self, field))  # JSON gives lists
            object.__setattr__(self, field, scales)
            if len(scales) != 2 or not all(isinstance(one, int | float) and math.isfinite(one) for one in scales):
                raise ValueError(f"A layer's {field} are two numbers; got {scales!r}.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"A window is a whole number of tokens from 1 up, or None; got {self.window!r}.")
        for name, field in (("layer_rope", "rope"), ("mixer", "mixer"), ("feed_forward", "feed_forward")):
            if getattr(self, field) not in CHOICES[name]:
                raise ValueError(f"A layer's {field} is one of {CHOICES[name]}; got {getattr(self, field)!r}.")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder-only transformer.

    Attributes:
        family: name of the file in `models/families` that knows its Hugging Face form.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of the feed-forward; unused with a mixture of experts, 0 if no layer has one.
        num_layers: transformer blocks.
        num_heads: query heads; 0, as the next two, in a model without attention.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: size of one head; even.
        max_position_embeddings: longest context, in tokens.
        rope: rotary embedding.
        norm_eps: epsilon of the norms.
        tie_embeddings: the output projection is the embedding.
        attention_bias: biases on the projections to queries, keys and values, and on the one back unless
            `attention_out_bias` says otherwise.
        mlp_bias: biases on the feed-forward's projections.
        moe: the mixture of experts that takes the feed-forward's place, in layers that do not say otherwise; None is a
            dense model.
        latent, mamba2, lightning: sizes of latent attention, Mamba-2 and lightning attention, in layers whose mixer it
            is.
        quantization: the weights that are kept quantised; None: none.
        pattern: the kinds of the layers, repeated from the first layer on.
        local_rope: rotary embedding of the layers that say so.
        learned_positions: a table of max_position_embeddings vectors is added to the embeddings.
        norm: "rms", "rms_offset" (one is added to the weight) or "layer" (with a bias).
        norm_placement: norms come "before" mixer and feed-forward, "after" them (before the addition), or "both";
            "residual": before, and what they give is also what the results are added to.
        qk_norm: RMSNorms of queries and keys: of each "head", of "all" heads of a token together, or None.
        sinks: attention learns one more logit a head, without a value.
        attention_scale: of the scores; None: 1 / sqrt(head_dim). attention_softcap: bends them; None: not.
        activation, gated: of the feed-forward, see `layers.mlp`.
        embedding_scale, residual_scale: multiply the embeddings, and what each layer adds.
        logit_scale: multiplies the logits. logit_softcap: then bends them; None: not.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"
    moe: MoEConfig | None = None
    latent: LatentAttentionConfig | None = None
    mamba2: Mamba2Config | None = None
    lightning: LightningConfig | None = None
    quantization: Quantization | None = None
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    local_rope: RopeConfig | None = None
    learned_positions: bool = False
    norm: str = "rms"
    norm_placement: str = "before"
    qk_norm: str | None = None
    sinks: bool = False
    attention_out_bias: bool | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    activation: str = "silu"
    gated: bool = True
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), self._least(field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{field.name} is a whole number from {least} up; got {value!r}.")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary embedding turns pairs; got {self.head_dim}.")
        if self.moe is not None and self.mlp_bias:
            raise ValueError("mlp_bias=True is for a dense model; experts have no biases. Leave it out, or moe.")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps lies between 0 and 1; got {self.norm_eps!r}.")
        for name in ("norm", "norm_placement", "activation", "qk_norm"):
            if getattr(self, name) not in CHOICES[name]:
                raise ValueError(f"{name} is one of {', '.join(map(str, CHOICES[name]))}; got {getattr(self, name)!r}.")
        for name in ("attention_scale", "attention_softcap", "embedding_scale", "residual_scale", "logit_scale"):
            self._check_positive(name)
        self._check_positive("logit_softcap")
        if self.qk_norm is not None and self.norm == "layer":
            raise ValueError("qk_norm is an RMSNorm of the model's own kind, and this model's norms are 'layer'.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is at most {MAX_LAYERS:,}; got {self.num_layers}.")
        if not 1 <= len(self.pattern) <= self.num_layers:
            raise ValueError(f"pattern has from 1 to num_layers={self.num_layers} kinds; got {len(self.pattern)}.")
        if self.latent is None and any(kind.mixer == "latent_attention" for kind in self.pattern):
            raise ValueError("pattern has layers of latent attention, and latent is None; give its sizes.")
        for mixer, field in RECURRENT.items():
            if getattr(self, field) is None and mixer in self.mixers:
                raise ValueError(f"pattern has layers of {mixer}, and {field} is None; give its sizes.")
        if self.local_rope is None and any(kind.rope == "local_rope" for kind in self.pattern):
            raise ValueError("pattern has layers with rope='local_rope', and local_rope is None; give it.")
        if any(rope and rope.size is not None and rope.size > self.head_dim for rope in (self.rope, self.local_rope)):
            raise ValueError(f"rope turns at most the head_dim={self.head_dim} numbers of a head; got {self.rope}.")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is a positive number{'' if 'scale' in name else ' or None'}; got {value!r}.")

    def _least(self, name: str) -> int:
        """The least value of a size: parts that no layer has, have none."""
        if name in ("num_heads", "num_kv_heads", "head_dim"):
            return int(any(mixer not in RECURRENT for mixer in self.mixers))
        if name == "intermediate_size":
            return int(any(kind.feed_forward is not None for kind in self.pattern))
        return 1

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixers that layers have, each once."""
        return tuple(dict.fromkeys(kind.mixer for kind in self.pattern))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_layers))

    def feed_forward(self, kind: LayerKind) -> str | None:
        """The module after the mixer in layers of this kind: "mlp", "moe" or None."""
        if kind.feed_forward == "default":
            return "mlp" if self.moe is None else "moe"
        return kind.feed_forward

    def has(self, kind: LayerKind, module: str) -> bool:
        """Whether blocks of layers of this kind have this module ("attention", "mlp_norm", ...)."""
        if module in MIXERS:
            return kind.mixer == module
        if module in FEED_FORWARDS:
            return self.feed_forward(kind) == module
        return not module.startswith("mlp_") or self.feed_forward(kind) is not None

    def layers_with(self, module: str) -> tuple[int, ...]:
        """The layers whose blocks have this module: what its stack [L, ...] holds, in order."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if self.has(kind, module))

    @property
    def latent_scale(self) -> float:
        """Of the scores of latent attention."""
        assert self.latent is not None
        plain = self.attention_scale or (self.latent.nope_dim + self.latent.rope_dim) ** -0.5
        return plain * (self.rope.scaling.score_factor if isinstance(self.rope.scaling, YarnScaling) else 1.0)

    @property
    def out_bias(self) -> bool:
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that a plan cuts, by the names of `Plan.problems`."""
        sizes = {
            "embed": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "vocab": self.vocab_size,
            "layers": self.num_layers,
            "layer_runs": self._layer_runs(),
            "states": sum(mixer in RECURRENT for mixer in self.mixers),
            "experts": self.moe.num_experts if self.moe else 0,
        }
        modules = {self.feed_forward(kind) for kind in self.pattern}
        widths = [self.intermediate_size] if "mlp" in modules else []
        if self.moe is not None and "moe" in modules:
            sizes["expert_mlp"] = self.moe.expert_size
            widths += [self.moe.shared_experts * self.moe.expert_size] if self.moe.shared_experts else []
        if widths:
            sizes["mlp"] = math.gcd(*widths)
        if self.latent is not None and "latent_attention" in self.mixers:
            sizes["latent_ranks"] = math.gcd(self.latent.kv_rank, self.latent.query_rank or 0)
        return sizes

    def _layer_runs(self) -> int:
        """How often the same kinds of layers come in the same order. Lightning attention's differ in their decays."""
        if "lightning_attention" in self.mixers:
            return 1
        kinds, length = self.kinds, 1
        while self.num_layers % length or kinds[length:] != kinds[:-length]:
            length += 1
        return self.num_layers // length

    def without_training(self) -> "DecoderConfig":
        """The same model without what only training reads, such as the load-balancing loss of a mixture."""
        if self.moe is None:
            return self
        return dataclasses.replace(self, moe=dataclasses.replace(self.moe, balance_loss=0, z_loss=0, bias_update=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        ropes = {name: rope and rope.to_dict() for name, rope in ((name, getattr(self, name)) for name in ROPES)}
        pattern = [dataclasses.asdict(kind) for kind in self.pattern]
        return json.loads(json.dumps({**dataclasses.asdict(self), **ropes, "pattern": pattern}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecoderConfig":
        """Raises ValueError on unknown or missing keys, and on values of another type."""
        given = plain.keys(values, "A decoder config")
        nested = {
            **dict.fromkeys(ROPES, RopeConfig.from_dict),
            "moe": MoEConfig.from_dict,
            "quantization": Quantization.from_dict,
            "latent": lambda one: plain.read(LatentAttentionConfig, one, "latent"),
            "mamba2": lambda one: plain.read(Mamba2Config, one, "mamba2"),
            "lightning": lambda one: plain.read(LightningConfig, one, "lightning"),
        }
        given |= {name: read(given[name]) for name, read in nested.items() if given.get(name) is not None}
        if isinstance(kinds := given.get("pattern"), list):
            given["pattern"] = tuple(plain.read(LayerKind, kind, "a kind of layers") for kind in kinds)
        return plain.read(cls, given, "A decoder config")


__all__ = ["DecoderConfig", "LayerKind", "keeps_dtype"]
