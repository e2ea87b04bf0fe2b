"""How tests compile programs that they run once or twice."""

# The same products and sums, compiled in a third of the time. (Without fusion emitters, `xla_cpu_use_fusion_emitters`,
# it would be a fifth, but a mixture on fsdp=4,stage=2 then waits forever: its devices meet in different orders.)
QUICK = {"xla_backend_optimization_level": 0}
