"""What needs the repository: micro-benchmarks under pytest-benchmark, README's numbers, measured results."""
