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
        norm_eps: of the latents' norms, which DeepSeek's code gives this one, whatever the others have.
    """

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps of latent attention is more than 0, got {self.norm_eps}.")
        sizes = (self.query_rank or 1, self.kv_rank, self.nope_dim, self.rope_dim, self.value_dim)
        if any(not isinstance(size, int) or size < 1 for size in sizes) or self.rope_dim % 2:
            raise ValueError(f"Latent attention has positive sizes, and an even rope_dim; got {self}.")


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """A state space model with a scalar decay for each head (Mamba-2, arXiv:2405.21060).

    Attributes:
        num_heads, head_dim: of the state; their product is the inner width.
        state_size: of a key, and of a query.
        groups: keys and queries, each shared by as many heads.
        conv_width: tokens that the convolution sees, its own the last.
        bias: of the projections in and out. conv_bias: of the convolution.
    """

    num_heads: int
    head_dim: int
    state_size: int
    groups: int = 1
    conv_width: int = 4
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.head_dim, self.state_size, self.groups, self.conv_width - 1)
        if any(not isinstance(size, int) or size < 1 for size in sizes) or self.num_heads % self.groups:
            raise ValueError(
                f"Mamba-2 has positive sizes, groups that divide num_heads, and a conv_width from 2 up; got {self}."
            )

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: values, keys and queries."""
        return self.inner_size + 2 * self.groups * self.state_size

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """What a layer keeps of each request: the convolution's last inputs, the latest last, and the state."""
        return {
            "inputs": (self.conv_width - 1, self.conv_size),
            "state": (self.num_heads, self.state_size, self.head_dim),
        }


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Linear attention with a fixed decay for each head (lightning attention, arXiv:2401.04658).

    Attributes:
        num_heads, head_dim: of queries, keys and values alike.
        norm_eps: epsilon of the RMSNorm over all heads of a token.
    """

    num_heads: int
    head_dim: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.head_dim)
        if any(not isinstance(size, int) or size < 1 for size in sizes) or not 0 < self.norm_eps < 1:
            raise ValueError(f"Lightning attention has positive sizes, and norm_eps below 1; got {self}.")

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """What a layer keeps of each request."""
        return {"state": (self.num_heads, self.head_dim, self.head_dim)}
