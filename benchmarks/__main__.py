"""Runs every bench_<op>.py in a process of its own, so that memory and compiled code of one op cannot touch another's."""

import json
import pathlib
import subprocess
import sys
import tempfile

from .harness import arguments


def main() -> int:
    args = arguments(__doc__)
    failed, merged = [], []
    for script in sorted(pathlib.Path(__file__).parent.glob("bench_*.py")):
        with tempfile.NamedTemporaryFile(suffix=".json") as result:
            flags = ["--json", result.name, "--device", args.device]
            flags += [a for a in ("--quick", "--first", "--no-compile") if a in sys.argv]
            flags += ["--threads", str(args.threads)] if args.threads else []
            if subprocess.run([sys.executable, str(script), *flags]).returncode:
                failed.append(script.name)
            text = pathlib.Path(result.name).read_text()
            merged += [json.loads(text)] if text else []
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(merged, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
