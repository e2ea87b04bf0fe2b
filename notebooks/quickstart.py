# A notebook as text: open it with Jupytext, VS Code or PyCharm, or run it with `python notebooks/quickstart.py`.

# %% [markdown]
# # Twinax in a notebook
# Make a small model, load it, let it write, look at what it expects, train it further.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np

import twinax

work = Path(tempfile.mkdtemp(prefix="twinax-quickstart-"))
text = Path(json.__file__).parent  # some text that every machine has: Python's own json package

# %% [markdown]
# ## A model to begin with
# A recipe says everything about a run. This one trains a very small model for twenty steps, on bytes. With a trained
# model of yours, or a Hugging Face folder of the Llama family, go on at the next cell.

# %%
from twinax.train.loop import train
from twinax.train.recipe import DataConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    model=ModelConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2),
    data=DataConfig(path=str(text), cache_dir=str(work / "cache")),
    optimizer=OptimizerConfig(lr=1e-2),
    eval=EvalConfig(every=0),
    steps=20,
    batch_size=4,
    sequence_length=128,
    output=str(work / "run"),
)
result = train(recipe, display=False)
print(f"loss {result.loss:.3f} after {result.step} steps; unigram entropy of the text {result.unigram_entropy:.3f}")

# %% [markdown]
# ## Load
# `load` takes a run, a step of it, or a Hugging Face folder.

# %%
model = twinax.load(work / "run")
print(model)
print(model.config)

# %% [markdown]
# ## Generate
# The same prompt and seed give the same text, here and from `twinax serve`.

# %%
print(model.generate("def ", max_tokens=40, temperature=0.8, seed=1))

# %%
for piece in model.stream("import ", max_tokens=40, temperature=0):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# ## Logits
# Row t is what the model expects after token t.

# %%
prompt = "import js"
logits = model.logits(prompt)
print(logits.shape, logits.dtype)

shifted = logits - logits.max(axis=-1, keepdims=True)
probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)
for token in np.argsort(-probabilities[-1])[:5]:
    print(f"{probabilities[-1, token]:6.1%}  {model.tokenizer.decode([int(token)])!r}")

# %% [markdown]
# ## Train ten steps
# On any text. The model is then the trained one; `output` holds its checkpoint.

# %%
before = model.logits(prompt)
losses = model.train(text, steps=10, learning_rate=3e-3, output=work / "more")
print(" ".join(f"{loss:.3f}" for loss in losses))
print(f"the logits moved by up to {np.abs(model.logits(prompt) - before).max():.2f}")
print(model.generate("def ", max_tokens=40, temperature=0.8, seed=1))
