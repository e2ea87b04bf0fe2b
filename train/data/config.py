"""What a recipe says about its data."""

from dataclasses import dataclass

from ...checkpoints.tokenizer import Tokenizer


class DataError(ValueError):
    """Training data is missing, unreadable, not text, or too small; the message says which file and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """Text to train on.

    Attributes:
      path: a file, a folder (read to its depths) or a glob pattern such as "docs/**/*.md"; or several of them.
        `.jsonl` and `.ndjson` files hold one JSON object a line, each a document; any other file is one document of
        text. Either may be compressed with gzip (`.gz`).
      tokenizer: "bytes", or a `tokenizer.json`, or a folder that holds one.
      text_key: the key of the text in JSON lines.
      eval_fraction: how much is held out for evaluation, 0 to 0.5; 0 holds out nothing.
      exclude: names of files and folders, with wildcards, that folders and patterns leave out.
      cache_dir: where tokens are kept between runs; by default `twinax/data` in the user's cache folder.
    """

    path: str | tuple[str, ...] = ""
    tokenizer: str = "bytes"
    text_key: str = "text"
    eval_fraction: float = 0.05
    exclude: tuple[str, ...] = (".*", "__pycache__", "site-packages", "dist-packages", "node_modules")
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        paths = (self.path,) if isinstance(self.path, str) else self.path
        if not all(isinstance(path, str) for path in paths):
            raise DataError(f"data.path must be a text or several, not {self.path!r}")
        if not 0 <= self.eval_fraction <= 0.5:
            raise DataError(
                f"data.eval_fraction must be from 0 to 0.5 (a share of the text), not {self.eval_fraction!r}"
            )
        if not self.text_key:
            raise DataError("data.text_key must name the key of the text in JSON lines, but it is empty")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple; DataError when it names nothing."""
        paths = tuple(path for path in ((self.path,) if isinstance(self.path, str) else self.path) if path)
        if not paths:
            raise DataError("data.path is not set: give a text file, a folder or a pattern such as 'docs/**/*.md'")
        return paths


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the config names."""
    return Tokenizer.bytes() if config.tokenizer == "bytes" else Tokenizer.load(config.tokenizer)
