"""How tests compile programs that they run once or twice."""

# The same products and sums, compiled in a fifth of the time: LLVM optimizes nothing, and fusions are written directly.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
