"""Makes the golden Llamas in this folder: random ones of transformers, with the logits that transformers gives them.

    python tests/golden/make_llama.py          needs torch and transformers (pip install 'twinax[peers]')

Each `llama_*/` is a Hugging Face folder as `save_pretrained` writes it; `llama_*.npz` holds tokens [B, T] int32 and
logits [B, T, V] float32, computed in float32 from the weights as they are stored.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
SMALL = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama_untied": (torch.float32, {}),
    "llama_tied_bfloat16": (torch.bfloat16, {"tie_word_embeddings": True}),
    "llama_3_rope": (torch.float32, {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_biases": (torch.float32, {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}),
}


def random_llama(seed: int, dtype: torch.dtype, **changes: object) -> transformers.LlamaForCausalLM:
    """A Llama whose every parameter is random, norms and biases too."""
    config = transformers.LlamaConfig(**{**SMALL, **changes})
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model.to(dtype).eval()


def logits_of(model: transformers.LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] float32, computed in float32 from the stored parameters."""
    # A fresh model: `to(bfloat16)` has rounded the rotary frequencies too, and `float()` would not bring them back.
    exact = transformers.LlamaForCausalLM(model.config).float().eval()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        return exact(torch.from_numpy(tokens).long()).logits.numpy()


def main() -> None:
    for seed, (name, (dtype, changes)) in enumerate(CASES.items()):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_llama(seed, dtype, **changes)
        model.save_pretrained(folder)
        tokens = np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (2, 48), dtype=np.int32)
        np.savez_compressed(HERE / f"{name}.npz", tokens=tokens, logits=logits_of(model, tokens))


if __name__ == "__main__":
    main()
