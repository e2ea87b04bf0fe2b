"""Plans of runs on machines that are not there: what fits, where memory goes, what crosses each mesh axis, how long.

Two ways to know, side by side: `model` computes it from the sizes in milliseconds, `compile` asks the real compiler.
"""
