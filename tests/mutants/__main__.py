"""python -m tests.mutants [text in "group: name" ...]: put in every seeded fault in turn, and print which the tests kill."""

import argparse
import pathlib

from . import INVALID, KILLED, ROOT, SURVIVED, Result, load, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("filters", nargs="*", help='only mutants with one of these in "group: name"')
    parser.add_argument("--list", action="store_true", help="name them, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once")
    options = parser.parse_args()
    mutants = load(pathlib.Path(__file__).parent, options.filters)
    if not mutants:
        parser.error("no mutant's name contains " + " or ".join(options.filters))
    if options.list:
        print("\n".join(map(str, mutants)))
        return 0
    width = max(len(str(m)) for m in mutants)

    def show(r: Result) -> None:
        note = f"as listed: {r.mutant.survives}" if r.mutant.survives and r.ok else r.why
        if r.mutant.survives and r.verdict == KILLED:
            note = f"though listed as surviving ({r.mutant.survives}): {r.why}"
        print(f"{r.mutant!s:{width}}  {r.verdict:8}  {r.seconds:4.0f} s  {note[:140]}", flush=True)

    results = run(ROOT, mutants, options.jobs, show)
    count = {v: sum(r.verdict == v for r in results) for v in (KILLED, SURVIVED, INVALID)}
    allowed = sum(r.ok and r.verdict == SURVIVED for r in results)
    rest = f", {count[SURVIVED]} survived ({allowed} for a listed reason)" if count[SURVIVED] else ""
    print(f"killed {count[KILLED]} of {len(results)}{rest}" + (f", {count[INVALID]} invalid" if count[INVALID] else ""))
    return 0 if all(r.ok for r in results) else 1


raise SystemExit(main())
