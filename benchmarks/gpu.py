"""python -m benchmarks.gpu: the GPU kit, tools/gpu.py, under its earlier name."""

import sys

from tools.gpu import main

if __name__ == "__main__":
    sys.exit(main())
