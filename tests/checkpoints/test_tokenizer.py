"""Tokenizers: bytes and back, streams, files, errors; the `tokenizers` library is the peer."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from twinax.checkpoints.tokenizer import Tokenizer, check_vocabulary
from twinax.checkpoints.tokenizer_files import TokenizerError

SAMPLE = "héllo  世界\n\t\x00 👍🏽 e\u0301 <|eos|> ﷽ \r\n  end "
BYTES = Tokenizer.bytes()


def library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(tokenizer.files()["tokenizer.json"])


def make(backend: tokenizers.Tokenizer, **config: object) -> Tokenizer:
    files = {"tokenizer.json": backend.to_str().encode()}
    return Tokenizer.from_files(files | ({"tokenizer_config.json": json.dumps(config).encode()} if config else {}))


def llama2_like() -> Tokenizer:
    """SentencePiece style: "▁" for a space, and byte tokens for what has no piece."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ["▁", "a", "b", "h", "é", "世", "▁a", "ab", "▁▁"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return make(backend, bos_token={"content": "<s>"}, eos_token="</s>")


def metaspace() -> Tokenizer:
    vocabulary = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0), ("▁ab", -1.5), ("世", -3.0), ("▁▁", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return make(backend)


def word_pieces() -> Tokenizer:
    vocabulary = {text: n for n, text in enumerate(["[UNK]", "a", "b", "##b", "##a", ".", "'", "t", "世", "don"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return make(backend)


def byte_level_bpe() -> Tokenizer:
    from twinax.train.data.bpe import bpe_from_texts

    return bpe_from_texts(iter(["the cat sat on the mat, 世界 世界 naïve café " * 20]), 300)


KINDS = {
    "bytes": (BYTES, "byte_level"),
    "bpe": (byte_level_bpe(), "byte_level"),
    "llama2": (llama2_like(), "byte_fallback"),
    "metaspace": (metaspace(), "metaspace"),
    "wordpiece": (word_pieces(), "generic"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer, name = KINDS[request.param]
    assert tokenizer._detokenizer.kind == name
    return tokenizer


# The byte tokenizer


def test_byte_ids_are_the_bytes():
    assert BYTES.encode("aé") == [0x61, 0xC3, 0xA9]
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id, BYTES.vocab_size) == (256, 257, 258, 259)
    assert BYTES.eos_ids == (257,)
    assert BYTES.is_bytes
    assert not BYTES.adds_bos
    assert [BYTES.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert BYTES.token_bytes(257) == b"<|eos|>"
    assert BYTES.token_bytes(10_000) == b""


@given(st.text())
@example(SAMPLE)
@example("<|bos|><|eos|")
def test_byte_tokenizer_is_the_librarys(text: str):
    assert BYTES.encode(text) == library(BYTES).encode(text).ids


@given(st.binary())
@example(b"\xe4\xb8A\xff\xf0\x9f\x98")
@example(b"\xed\xa0\x80\xc0\x80")
def test_byte_tokenizer_takes_any_bytes(data: bytes):
    ids = BYTES.encode_bytes(data)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == data
    assert BYTES.decode(ids) == data.decode(errors="replace") == library(BYTES).decode(ids.tolist())


def test_special_tokens_in_text_are_read_only_on_request():
    assert BYTES.encode("a<|eos|>") == [97, 257]
    assert BYTES.encode("a<|eos|>", special=False) == list(b"a<|eos|>")
    assert BYTES.encode_bytes(b"a<|eos|>").tolist() == list(b"a<|eos|>")
    llama, _ = KINDS["llama2"]
    assert llama.encode("a</s>")[-1] == 2
    assert 2 not in llama.encode("a</s>", special=False)
    assert 2 not in llama.encode_bytes(b"a</s>")


def test_decode_skips_special_tokens_unless_told():
    ids = [256, 104, 105, 257]
    assert BYTES.decode(ids) == "hi"
    assert BYTES.decode(ids, skip_special=False) == "<|bos|>hi<|eos|>"


# All kinds


def test_encode_and_decode_are_the_librarys(kind: Tokenizer):
    peer = library(kind)
    for text in ["", " ", "a", "ab ab", " ab  世 é", "don't a.b", SAMPLE]:
        ids = kind.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False).ids
        assert kind.decode(ids) == peer.decode(ids)
        assert kind.decode(ids, skip_special=False) == peer.decode(ids, skip_special_tokens=False)
    assert kind.encode_batch(["a", "ab"]) == [kind.encode("a"), kind.encode("ab")]


def test_stream_gives_what_decode_gives_on_any_ids(kind: Tokenizer):
    generator = random.Random(0)
    for _ in range(400):
        ids = generator.choices(range(kind.vocab_size + 2), k=generator.randrange(12))
        for skip in (True, False):
            stream = kind.stream(skip_special=skip)
            assert "".join([*(stream.step(i) or "" for i in ids), stream.flush()]) == kind.decode(ids, skip)


@given(st.lists(st.integers(0, 260)))
@example([0xF0, 0x9F, 257, 0x91, 0x8D])
def test_byte_stream_gives_what_decode_gives(ids: list[int]):
    stream = BYTES.stream()
    assert "".join([*(stream.step(i) or "" for i in ids), stream.flush()]) == BYTES.decode(ids)


@given(st.text())
@example(SAMPLE)
def test_stream_never_emits_half_a_character(text: str):
    stream = BYTES.stream()
    pieces = [stream.step(byte) for byte in text.encode()]
    assert [piece for piece in pieces if piece is not None] == list(text)
    assert stream.flush() == ""


def test_stream_flushes_an_unfinished_character():
    stream = BYTES.stream()
    assert [stream.step(byte) for byte in b"a\xe4\xb8"] == ["a", None, None]
    assert stream.flush() == "\ufffd"


def test_byte_fallback_keeps_the_valid_characters_of_an_invalid_run():
    llama, _ = KINDS["llama2"]
    ids = [byte + 3 for byte in b"\xe4\xb8\xad\xff"]
    assert llama.decode(ids) == "中\ufffd"
    assert llama.token_bytes(ids[0]) == b"\xe4"
    assert llama.token_bytes(llama.token_to_id("▁a") or -1) == b" a"


def test_window_stream_holds_a_long_text_in_a_short_window():
    tokenizer = word_pieces()
    stream = tokenizer.stream()
    ids = tokenizer.encode("ab a.b " * 500)
    text = "".join([*(stream.step(i) or "" for i in ids), stream.flush()])
    assert text == tokenizer.decode(ids)
    assert len(stream._window) <= 2  # type: ignore[union-attr]


def test_add_bos(kind: Tokenizer):
    if kind.bos_id is None:
        with pytest.raises(TokenizerError, match="has none"):
            kind.encode("a", add_bos=True)
    else:
        assert kind.encode("a", add_bos=True) == [kind.bos_id, *kind.encode("a")]


def test_adds_bos_is_what_the_post_processor_does():
    assert KINDS["llama2"][0].adds_bos
    assert not KINDS["bpe"][0].adds_bos


def test_truncation_and_padding_left_in_a_file_are_ignored():
    backend = library(BYTES)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    files = {"tokenizer.json": backend.to_str().encode()}
    assert Tokenizer.from_files(files).encode("<|bos|>hello") == [256, *b"hello"]


# Files


def test_files_come_back_byte_for_byte(tmp_path: Path, kind: Tokenizer):
    folder = tmp_path / "one"
    kind.save(folder)
    # As someone else may have laid them out.
    layout = json.dumps(json.loads((folder / "tokenizer.json").read_text()), indent=1, ensure_ascii=True)
    (folder / "tokenizer.json").write_text(layout)
    (folder / "special_tokens_map.json").write_text('{ "cls_token" :"x"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    loaded = Tokenizer.load(folder)
    loaded.save(tmp_path / "two")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert sorted(loaded.files()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    again = Tokenizer.from_files(loaded.files())
    assert again.encode(SAMPLE) == kind.encode(SAMPLE)
    assert again.fingerprint == loaded.fingerprint
    assert again.is_bytes == kind.is_bytes


def test_load_takes_a_file_of_any_name_and_guesses_special_tokens(tmp_path: Path):
    (tmp_path / "mine.json").write_bytes(BYTES.files()["tokenizer.json"])
    loaded = Tokenizer.load(tmp_path / "mine.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (256, 257, 258)
    assert json.loads(loaded.files()["tokenizer_config.json"])["eos_token"] == "<|eos|>"


def test_tokens_named_only_in_the_config_are_added():
    entry = {"content": "<|tool|>", "special": True}
    tokenizer = make(library(BYTES), added_tokens_decoder={"259": entry}, eos_token="<|tool|>")
    assert tokenizer.encode("<|tool|>") == [259]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (259, 260)
    with pytest.raises(TokenizerError, match=r"the id 300, but tokenizer.json leaves it 259"):
        make(library(BYTES), added_tokens_decoder={"300": entry})
    with pytest.raises(TokenizerError, match="must map ids to objects"):
        make(library(BYTES), added_tokens_decoder={"300": "<|tool|>"})


def test_fingerprint_sees_vocabulary_and_end_token():
    same = Tokenizer.from_files(BYTES.files())
    other = make(library(BYTES), eos_token="<|pad|>")
    assert same.fingerprint == BYTES.fingerprint
    assert len({BYTES.fingerprint, other.fingerprint, KINDS["bpe"][0].fingerprint}) == 3


# Errors


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer.json"),
        ({"tokenizer.model": "x"}, "older form.*save_pretrained"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "\xff\xfe"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "[]"}, "must hold a JSON object"),
        ({"tokenizer.json": '{"a": 1}'}, 'no "model"'),
        ({"tokenizer.json": '{"model": {"type": "Nonsense"}}'}, "cannot read it"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "given", [-1, True, [1], [[]], [{"name": "default"}], {"default": 3}, [{"name": "a", "template": 1}]]
)
def test_a_chat_template_is_a_text_or_several_with_names(given):
    with pytest.raises(TokenizerError, match="chat_template is a text, or a list of objects"):
        make(library(BYTES), chat_template=given)


def test_a_missing_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*nowhere.*'bytes'"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_config_of_another_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match=r"names eos_token = '<\|im_end\|>', which is not in the vocabulary"):
        make(library(BYTES), eos_token="<|im_end|>")


def test_vocabulary_must_fit_the_model():
    check_vocabulary(BYTES, 259)
    check_vocabulary(BYTES, 320)
    with pytest.raises(TokenizerError, match=r"ids up to 258.*vocab_size >= 259, but it has 258"):
        check_vocabulary(BYTES, 258)


def test_lone_surrogates_and_other_types_are_refused(kind: Tokenizer):
    with pytest.raises(TokenizerError, match=r"lone surrogate .* at character 1"):
        kind.encode("a\ud800")
    with pytest.raises(TokenizerError, match="encodes str, but was given bytes"):
        kind.encode(b"a")  # type: ignore[arg-type]


def test_no_heavy_imports():
    import subprocess

    code = "import sys, twinax.checkpoints.tokenizer as t; t.Tokenizer.bytes().encode('a'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"jax", "torch", "transformers", "flax"} & set(loaded)
