"""What a decoder is made of. No JAX here, so that a config can be read, checked and printed anywhere."""

import dataclasses
from typing import Any

from ..layers.moe_config import MoEConfig
from ..layers.rope_config import Llama3Scaling, RopeConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder-only transformer.

    Attributes:
        family: name of the file in `models/families` that knows its Hugging Face form.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of the feed-forward; unused with a mixture of experts.
        num_layers: transformer blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: size of one head; even.
        max_position_embeddings: longest context, in tokens.
        rope: rotary embedding.
        norm_eps: epsilon of RMSNorm.
        tie_embeddings: the output projection is the embedding.
        attention_bias, mlp_bias: biases on those projections.
        moe: the mixture of experts that takes the feed-forward's place in every layer; None is a dense model.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{field.name} is a whole number from 1 up; got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary embedding turns pairs; got {self.head_dim}.")
        if self.moe is not None and self.mlp_bias:
            raise ValueError("mlp_bias=True is for a dense model; experts have no biases. Leave it out, or moe.")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps lies between 0 and 1; got {self.norm_eps!r}.")

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that a plan cuts, by the names of `Plan.problems`."""
        sizes = {
            "embed": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "vocab": self.vocab_size,
            "layers": self.num_layers,
        }
        if self.moe is None:
            return {**sizes, "mlp": self.intermediate_size, "experts": 0}
        return {**sizes, "experts": self.moe.num_experts, "expert_mlp": self.moe.expert_size}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecoderConfig":
        """Raises ValueError on unknown or missing keys."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        required = {
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING is field.default_factory
        }
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ValueError(
                f"A decoder config has the keys {sorted(known)}; unknown here: {unknown}, missing: {missing}. "
                "It may come from another version of Twinax."
            )
        rope = dict(values.get("rope") or {})
        scaling = rope.pop("scaling", None)
        moe = values.get("moe")
        return cls(
            **{key: value for key, value in values.items() if key not in ("rope", "moe")},
            moe=None if moe is None else MoEConfig.from_dict(moe),
            rope=RopeConfig(**rope, scaling=Llama3Scaling(**scaling) if scaling else None),
        )
