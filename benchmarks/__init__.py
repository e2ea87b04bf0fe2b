"""Benchmarks: `python -m benchmarks.NAME [--json FILE]` compares Twinax with a named peer in one run."""
