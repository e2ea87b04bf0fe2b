"""Makes the golden families in `families/`: small random models of transformers, with the logits that it gives them.

    python tests/golden/make_families.py [NAME ...]          needs torch and transformers (pip install 'twinax[peers]')

Each folder is as `save_pretrained` writes it, in bfloat16; `logits.npz` in it holds tokens [B, T] int32, lengths [B]
(what follows is padding) and logits [B, T, V] float32, computed in float32 from the weights as they are stored.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent / "families"
WINDOW, CONTEXT = 8, 128
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "moe_intermediate_size": 20, "n_routed_experts": 6, "n_shared_experts": 2,
}  # fmt: skip
ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.5, 2.0, 3.0, 6.0]}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


# Name -> (model class, changes to `SMALL`; None leaves one out).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_linear": ("Llama", _rope("linear", factor=4.0)),
    "llama_dynamic": ("Llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 24}),
    "llama_yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True,
                               "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 4, "layer_types":
        ["sliding_attention", "full_attention"] * 2, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3_longrope": ("Phi3", {**_rope("longrope", **FACTORS), "original_max_position_embeddings": 16}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "granite": ("Granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                            "attention_multiplier": 0.1}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "gpt_oss": ("GptOss", {"head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
                           "sliding_window": WINDOW, "swiglu_limit": 1.0, **_rope("yarn", factor=4.0, truncate=False,
                           original_max_position_embeddings=16)}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "num_experts_per_tok": 2, "q_lora_rank": None, "first_k_dense_replace": 1,
                                   **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7,
                                           mscale_all_dim=0.7)}),
    "deepseek_v2_groups": ("DeepseekV2", {**LATENT, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
                                          "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "num_hidden_layers": 5, "num_experts_per_tok": 3, "n_group": 3,
                                   "topk_group": 2, "first_k_dense_replace": 2, "num_mtp_layers": 0,
                                   **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0,
                                           mscale_all_dim=1.0)}),
    "mamba2": ("Mamba2", {**dict.fromkeys(ATTENTION), "num_heads": 8, "head_dim": 8, "state_size": 16,
                          "n_groups": 2}),
    "minimax": ("MiniMax", {"num_hidden_layers": 5, "layer_types": ["linear_attention"] * 2 + ["full_attention"] +
                            ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 16,
                            "full_attn_alpha_factor": 3.5, "full_attn_beta_factor": 1.1, "linear_attn_alpha_factor":
                            3.0, "linear_attn_beta_factor": 0.9, "mlp_alpha_factor": 2.5, "mlp_beta_factor": 1.2}),
    "gpt2": ("GPT2", {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "hidden_size": None,
                      "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
                      "num_key_value_heads": None, "max_position_embeddings": None}),
}  # fmt: skip
# Of Mamba-2: what lets a state last for some tens of tokens.
OF_STATES = {"dt_bias": -3.0, "D": 1.0}
# Rotary frequencies are not in files, but the decays of MiniMax are.
COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
# Cases whose folder has quantised weights: the case that they are made from, and changes to it.
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss_mxfp4": ("gpt_oss", {"intermediate_size": 64}),
    "deepseek_v3_fp8": ("deepseek_v3", {}),
}
FP8_BLOCK = 16
NAMES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def random_model(name: str, seed: int = 0, **more: Any) -> Any:
    """A model in bfloat16 whose every parameter is random, norms and biases too; `more` changes its config."""
    kind, changes = CASES[name]
    changes = {**changes, **more}
    config_name, model_name = NAMES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    left_out = {key for key, value in changes.items() if value is None and key in SMALL and kind in ("GPT2", "Mamba2")}
    given = {key: value for key, value in {**SMALL, **changes}.items() if key not in left_out}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in parameter_name or ".ln_" in parameter_name
            near = 0.0 if kind.startswith("Gemma") or parameter_name.endswith("bias") else 1.0
            usual = OF_STATES.get(parameter_name.rpartition(".")[2], 0.0)
            parameter.copy_(near + 0.2 * noise if is_norm else usual + 0.3 * noise)
        for buffer_name, buffer in sorted(model.named_buffers()):
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.to(torch.bfloat16).eval()


def exact(model: Any) -> Any:
    """The same model in float32, computed from the parameters as they are stored."""
    # A fresh one: `to(bfloat16)` has rounded what is computed too, and `float()` would not bring it back.
    made = type(model)(model.config).float().eval()
    stored = {name: tensor.float() for name, tensor in model.state_dict().items() if not name.endswith(COMPUTED)}
    assert not made.load_state_dict(stored, strict=False).unexpected_keys
    return made


def quantise(name: str, model: Any, folder: Path) -> None:
    """Quantises weights in `folder`, where `model` was saved, and gives the model what they then stand for."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    meant = model.state_dict()
    if name == "gpt_oss_mxfp4":
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                       "lm_head"],
        }  # fmt: skip
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, into, out = tensors.pop(key).shape
            blocks = torch.randint(0, 256, (experts, out, into // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 126, (experts, out, into // 32), generator=generator, dtype=torch.uint8)
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = blocks, scales
            meant[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    else:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }  # fmt: skip
        rounded = {}
        for key in list(tensors):
            if not key.endswith("proj.weight") and "kv_a_proj" not in key:
                continue
            weight = tensors[key].float()
            rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
            padded = torch.zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
            padded[: weight.shape[0], : weight.shape[1]] = weight
            cut = padded.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
            scale = cut.abs().amax((1, 3)) / 448
            values = (cut / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            back = (values.float() * scale[:, None, :, None]).reshape(padded.shape)
            tensors[key] = values.reshape(padded.shape)[: weight.shape[0], : weight.shape[1]].contiguous()
            tensors[key.removesuffix("weight") + "weight_scale_inv"] = scale
            rounded[key] = back[: weight.shape[0], : weight.shape[1]]
        meant = {**meant, **_stacked(rounded, meant)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float().load_state_dict(meant)


def _stacked(rounded: dict[str, torch.Tensor], meant: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file as transformers holds them: experts in one, gate and up one below the other."""
    found = {key: tensor for key, tensor in rounded.items() if key in meant}
    for key in meant:
        if ".experts." in key:
            begin = key.rpartition(".")[0]
            parts = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
            each = [torch.cat([rounded[f"{begin}.{n}.{p}.weight"] for p in parts]) for n in range(len(meant[key]))]
            found[key] = torch.stack(each)
    return found


def batch(seed: int, vocab_size: int = SMALL["vocab_size"], length: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, T] and their lengths [3]."""
    tokens = np.random.default_rng(seed).integers(3, vocab_size, (3, length), dtype=np.int32)
    return tokens, np.array([length, length // 4, 13], np.int32)


def logits_of(model: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32; those of padding are zero. Rows one by one: some ropes look at the longest."""
    found = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
            found[row, :length] = model(torch.from_numpy(ids[None, :length]).long()).logits[0].numpy()
    return found


def save(name: str, folder: Path, seed: int = 0, **more: Any) -> Any:
    """Makes a case's folder; the model that it holds, in float32."""
    case, changes = QUANTIZED.get(name, (name, {}))
    model = random_model(case, seed, **changes, **more)
    model.save_pretrained(folder)
    model = exact(model)
    if name in QUANTIZED:
        quantise(name, model, folder)
    return model


def main(names: list[str]) -> None:
    for name in names or (*CASES, *QUANTIZED):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = save(name, folder)
        tokens, lengths = batch(0)
        logits = logits_of(model, tokens, lengths)
        np.savez_compressed(folder / "logits.npz", tokens=tokens, lengths=lengths, logits=logits)
        print(name, f"{np.abs(logits).max():.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
