"""What the benchmarks compare with, each in a process of its own, in the environment that `--peer-python` names."""
