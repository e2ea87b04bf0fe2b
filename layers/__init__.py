"""NNX modules of a transformer block. A layer never knows whether it trains or serves: its context does the mixing."""
