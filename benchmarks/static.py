"""python -m benchmarks.static: the table of tools/static.py, under its earlier name."""

import sys

from tools.static import main

if __name__ == "__main__":
    sys.exit(main())
