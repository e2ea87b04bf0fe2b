"""A Hugging Face folder as GGUF: `python gguf_model.py FOLDER OUT.gguf F32|BF16|F16|Q8_0`. Needs the gguf package only.

Llama's shape without biases, safetensors in float32 or bfloat16, a byte-level BPE tokenizer. llama.cpp rotates
neighbouring pairs of dimensions where Hugging Face's files rotate the two halves of a head, so the rows of Q and K are
reordered.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Of a safetensors file: its header is JSON behind 8 bytes of length."""
    data = np.memmap(path, np.uint8, "r")
    size = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + size]))
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        if one["dtype"] not in ("F32", "BF16"):
            sys.exit(f"{name} is {one['dtype']}; float32 and bfloat16 are read here")
        begin, end = (8 + size + at for at in one["data_offsets"])
        array = data[begin:end]
        # bfloat16 is the upper half of a float32.
        wide = array.view("<f4") if one["dtype"] == "F32" else (array.view("<u2").astype("<u4") << 16).view("<f4")
        found[name] = wide.reshape(one["shape"])
    return found


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, in]: of each head, row i of the first half and row i of the second next to each other."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write(folder: Path, out: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = gguf.GGMLQuantizationType[kind]
    file_type = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}[kind]
    writer = gguf.GGUFWriter(out, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"] | {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    special = {one["id"] for one in tokenizer["added_tokens"]}
    names = sorted(pieces, key=pieces.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(names))]
    )
    # A list must not be empty; prompts are sent as ids, so nothing is ever merged.
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]] or ["a b"])
    writer.add_add_bos_token(False)
    for name, weight in tensors(folder / "model.safetensors").items():
        if name in OUTSIDE:
            new = OUTSIDE[name]
        else:
            layer, _, rest = name.removeprefix("model.layers.").partition(".")
            new = f"blk.{layer}.{INSIDE[rest.removesuffix('.weight')]}.weight"
        if "attn_q" in new or "attn_k" in new:
            weight = interleaved(weight, heads if "attn_q" in new else kv_heads)
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(new, np.ascontiguousarray(weight))
        else:
            writer.add_tensor(new, gguf.quants.quantize(weight, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
