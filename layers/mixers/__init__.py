"""Token mixers: what lets tokens see each other. A file each, whose name is the one that a `LayerKind` gives.

A mixer is an NNX module over [..., E], called as `mixer(x, rope, context, cache, layer, window)`, that returns
[..., E] and the cache. It never knows whether it trains or serves: the context mixes (`layers/contexts.py`), and keeps
what is to be kept, at index `layer` of the mixer's own layers:

- for each token: keys and values, or a latent, in pages;
- for each request: a state (`layers/cache.py`), whose shapes the mixer's config names.
"""
