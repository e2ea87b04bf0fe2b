"""Settings of token mixers other than plain attention. No JAX here: configs are read where JAX is not wanted."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Attention whose keys and values come from a latent a token (DeepSeek-V2, arXiv:2405.04434).

    Attributes:
        query_rank: size of the latent that queries come from; None: they come from the token itself.
        kv_rank: size of the latent that keys and values come from; it is what the cache keeps, with the turned part.
        nope_dim, rope_dim: sizes of the parts of a head that is not turned, and that is. All heads share the latter's
            key.
        value_dim: size of a head's value.
        interleaved: the turned pairs are (x[2i], x[2i + 1]), and not (x[i], x[i + rope_dim / 2]).
    """

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True

    def __post_init__(self) -> None:
        sizes = (self.query_rank or 1, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        if any(not isinstance(size, int) or size < 1 for size in sizes) or self.rope_dim % 2:
            raise ValueError(f"Latent attention has positive sizes, and an even rope_dim; got {self}.")
