"""Benchmarks that show no number for a wrong result: python -m benchmarks, or python benchmarks/bench_<op>.py."""
