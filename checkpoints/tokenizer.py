"""Tokenizers: `tokenizer.json` and `tokenizer_config.json` as Hugging Face has them, without transformers.

- A `Tokenizer` is its files: `save` writes back, byte for byte, those it was loaded from.
- `Tokenizer.bytes()` is the default: ids 0..255 are the bytes, and three special tokens follow.
- Ids are Python ints (lists) or int32 arrays; text is `str`; `encode_bytes` takes any bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from .chat_template import ChatTemplateError, render
from .detokenize import ByteStream, Detokenizer, WindowStream, byte_alphabet
from .tokenizer_files import (
    CONFIG,
    MAIN,
    SPECIAL_MAP,
    TEMPLATE,
    TokenizerError,
    check_spec,
    default_config,
    parse,
    read_files,
    read_templates,
)

Bytes = bytes  # inside the class below, `bytes` is the method
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")  # of the tokenizers that we make


class Tokenizer:
    """Text to ids and back. Make one with `bytes()`, `load(path)` or `from_files(files)`.

    Attributes:
      vocab_size: the largest id plus one; a model's embedding needs at least so many rows.
      bos_id, eos_id, pad_id: None where the tokenizer has no such token.
      chat_template: the default Jinja template, or None.
    """

    def __init__(self, files: Mapping[str, Bytes], where: str = "tokenizer"):
        self._files = dict(files)
        self._where = where
        if MAIN not in self._files:
            raise TokenizerError(f"{where}: a tokenizer needs the file {MAIN}, but there is only {sorted(self._files)}")
        spec = parse(self._files[MAIN], f"{where}/{MAIN}")
        check_spec(spec, f"{where}/{MAIN}")
        self._backend = self._make_backend()
        if CONFIG not in self._files:
            self._files[CONFIG] = default_config(spec)
        self._config = parse(self._files[CONFIG], f"{where}/{CONFIG}")
        if SPECIAL_MAP in self._files:
            self._config = parse(self._files[SPECIAL_MAP], f"{where}/{SPECIAL_MAP}") | self._config
        self._add_config_tokens(self._backend)

        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id, self.eos_id = self._special("bos_token"), self._special("eos_token")
        self.pad_id = self._special("pad_token", required=False)
        self._templates = read_templates(self._files, self._config, where)
        added = self._backend.get_added_tokens_decoder()
        self._added_texts = tuple(token.content for token in added.values())
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._detokenizer = Detokenizer(
            spec.get("decoder"),
            self._backend.id_to_token,
            self.special_ids,
            lambda ids: self._backend.decode(ids, skip_special_tokens=False),
        )
        self.is_bytes = _is_byte_vocabulary(spec)

    # Making one

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The byte-level tokenizer: id = byte for 0..255, then <|bos|>, <|eos|>, <|pad|> (256, 257, 258)."""
        vocabulary = {character: byte for character, byte in byte_alphabet().items()}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls.from_backend(backend)

    @classmethod
    def from_backend(cls, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """Wraps a tokenizer of the `tokenizers` library, adding our three special tokens where they are missing."""
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
        return cls({MAIN: backend.to_str(pretty=True).encode()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a folder that holds tokenizer.json, or such a file (and those beside it if that is its name)."""
        return cls(*read_files(Path(path).expanduser()))

    @classmethod
    def from_files(cls, files: Mapping[str, Bytes], where: str = "tokenizer") -> "Tokenizer":
        """From the files' contents by name, as `files()` gives them."""
        return cls(files, where)

    def files(self) -> dict[str, Bytes]:
        """The files' contents by name (a folder in a name is written with "/")."""
        return dict(self._files)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files into a folder, made if missing."""
        for name, data in self._files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def _make_backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_buffer(self._files[MAIN])
            backend.encode("")  # what puts tokens around a text names tokens that there are
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"{self._where}/{MAIN}: the tokenizers library cannot read it: {error}") from error
        # Settings left over from someone's training run would cut or pad texts silently.
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _add_config_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Some folders name added tokens in tokenizer_config.json only."""
        try:
            named = self._config.get("added_tokens_decoder", {})
            entries = sorted(
                ((int(key), entry["content"], entry) for key, entry in named.items()), key=lambda item: item[0]
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(
                f'{self._where}/{CONFIG}: "added_tokens_decoder" must map ids to objects with "content"; '
                f"it does not ({type(error).__name__}: {error})"
            ) from error
        for key, text, entry in entries:
            if backend.token_to_id(text) is not None:
                continue
            flags = {k: entry.get(k, False) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([AddedToken(text, **flags)])
            if backend.token_to_id(text) != key:
                raise TokenizerError(
                    f"{self._where}: {CONFIG} gives {text!r} the id {key}, but {MAIN} leaves it "
                    f"{backend.token_to_id(text)}; the two files are of different tokenizers"
                )

    def _special(self, key: str, required: bool = True) -> int | None:
        text = self.special_tokens.get(key)
        found = None if text is None else self._backend.token_to_id(text)
        if text is not None and found is None and required:
            raise TokenizerError(
                f"{self._where}: {CONFIG} names {key} = {text!r}, which is not in the vocabulary of {MAIN}; "
                "the two files are of different tokenizers"
            )
        return found

    # What it is

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the named special tokens: {"bos_token": ..., "eos_token": ..., ...}."""
        named = {key: value for key, value in self._config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a generation, as far as the tokenizer knows."""
        return () if self.eos_id is None else (self.eos_id,)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself begins every text with BOS (its post-processor does, as Llama's)."""
        return self.bos_id is not None and self._backend.encode("").ids[:1] == [self.bos_id]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the ids of a text; keys caches of tokens."""
        parts = [self._files[MAIN], json.dumps([self.bos_id, self.eos_id, self.vocab_size]).encode()]
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()

    def token_to_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    def __repr__(self) -> str:
        return f"Tokenizer({self._where!r}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_id={self.eos_id})"

    # Text to ids

    def keep_no_words(self) -> None:
        """For texts of strangers: `encode` and `encode_batch` remember no words.

        The library keeps the ids of the first 10,000 words that it sees, about 32 bytes for each of a word's
        characters, of which a word may have 255. They make it a tenth quicker.
        """
        model = self._backend.model
        if isinstance(model, models.BPE | models.Unigram):
            model._resize_cache(0)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """Reads the text of special tokens as plain text."""
        backend = self._make_backend()
        self._add_config_tokens(backend)
        backend.encode_special_tokens = True
        return backend

    def encode(self, text: str, add_bos: bool = False, *, special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
          text: any Unicode text; a lone surrogate is an error.
          add_bos: put `bos_id` first (an error where there is none).
          special: read "<|eos|>" in the text as that token, as Hugging Face does; else as plain text.
        """
        return self.encode_batch([text], add_bos, special=special)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool = False, *, special: bool = True) -> list[list[int]]:
        """The ids of each text (in parallel where the tokenizers library can)."""
        if add_bos and self.bos_id is None:
            raise TokenizerError(f"{self._where}: add_bos needs a BOS token and this tokenizer has none")
        first = [self.bos_id] if add_bos and self.bos_id is not None else []
        for text in texts:
            _check_text(text)
        if self.is_bytes and not (special and any(added in text for text in texts for added in self._added_texts)):
            return [first + list(text.encode()) for text in texts]
        backend = self._backend if special else self._plain_backend
        return [first + ids for ids in self._ids(backend, list(texts))]

    def encode_bytes(self, data: Bytes | bytearray | memoryview) -> np.ndarray:
        """Ids [tokens] int32 of raw bytes, for training text: special tokens are never read out of it.

        The byte-level tokenizer takes any bytes as they are; others see U+FFFD where the bytes are not UTF-8.
        """
        return self.encode_bytes_batch([data])[0]

    def encode_bytes_batch(self, texts: Sequence[Bytes | bytearray | memoryview]) -> list[np.ndarray]:
        """`encode_bytes` of each text (in parallel where the tokenizers library can)."""
        if self.is_bytes:
            return [np.frombuffer(data, dtype=np.uint8).astype(np.int32) for data in texts]
        decoded = [str(data, "utf-8", "replace") for data in texts]
        return [np.asarray(ids, dtype=np.int32) for ids in self._ids(self._plain_backend, decoded)]

    def _ids(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        try:
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # bare, from the library: an unknown character where the unk_token is no token
            raise TokenizerError(f"{self._where}: the tokenizer has no ids for this text: {error}") from error

    # Ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; U+FFFD where their bytes are not UTF-8; ids without a token give nothing."""
        return self._detokenizer.decode(ids, skip_special)

    def stream(self, skip_special: bool = True) -> ByteStream | WindowStream:
        """A decoder with `.step(id) -> str | None` and, at the end, `.flush() -> str`; joined they equal `decode`."""
        return self._detokenizer.stream(skip_special)

    @property
    def has_token_bytes(self) -> bool:
        """Whether each token stands for the same bytes in any text, so that `token_bytes` says it all."""
        return self._detokenizer.kind != "generic"

    def token_bytes(self, token_id: int) -> Bytes:
        """The bytes a token stands for; b"" for an id without a token."""
        return self._detokenizer.token_bytes(token_id)

    # Chats

    @property
    def chat_template(self) -> str | None:
        return self._templates.get("default")

    def template_for(self, tools: bool) -> str | None:
        """The template of conversations with tools, which some models have apart, or without."""
        return (self._templates.get("tool_use") if tools else None) or self.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt (text) for a conversation. Encode it with `add_bos=False`: templates write BOS themselves.

        Raises:
          ChatTemplateError: no template, or it refuses the conversation.
        """
        source = self.template_for(bool(tools))
        if source is None:
            raise ChatTemplateError(
                f"{self._where} has no chat template; put one in {TEMPLATE} beside {MAIN}, or send a plain completion"
            )
        return render(source, messages, tools, add_generation_prompt, **{**self.special_tokens, **variables})


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises TokenizerError unless a model with `vocab_size` embeddings has a row for every id of the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer does not fit the model: it has ids up to {tokenizer.vocab_size - 1}, so the model needs "
            f"vocab_size >= {tokenizer.vocab_size}, but it has {vocab_size}; use the model's own tokenizer, "
            f"or a model with vocab_size={tokenizer.vocab_size}"
        )


def _is_byte_vocabulary(spec: dict[str, Any]) -> bool:
    """Whether encoding is the identity on bytes, so that it needs no library."""
    model, before, after = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("decoder") or {}
    return (
        model.get("type") == "BPE"
        and not model.get("merges")
        and model.get("vocab") == byte_alphabet()
        and spec.get("normalizer") is None
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and after.get("type") == "ByteLevel"
    )


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate ({text[error.start]!r}) at character {error.start}, which is not valid "
            "Unicode; remove it or replace it by U+FFFD"
        ) from error
    except AttributeError as error:
        raise TokenizerError(f"a tokenizer encodes str, but was given {type(text).__name__}") from error
