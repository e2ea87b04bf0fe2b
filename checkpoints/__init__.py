"""Checkpoints: read and write streams of (name, array), as Twinax step folders (Orbax arrays) and Hugging Face folders.

- `store`: the asynchronous store of a training run: atomic commits, a checksum for every file, verified restores.
- `load`: any of the three kinds of folder (step, run, Hugging Face) as a model's parameters.
- `convert`, `inspect`: what `twinax convert` and `twinax inspect` do.
- `safetensors`, `arrays`, `manifest`, `files`: the formats themselves, without JAX.
- `tokenizer`: Hugging Face tokenizers.
"""
