"""What needs the repository: micro-benchmarks under pytest-benchmark, README's numbers, the GPU kit, the static table."""
