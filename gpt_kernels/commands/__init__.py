"""The commands of `python -m gpt_kernels`, a file each, found by its name: bench_diff.py is `bench diff`.

| in the file       | is                                                                                                  |
|-------------------|-----------------------------------------------------------------------------------------------------|
| docstring         | its first line stands in `--help`, all of it in `COMMAND --help`                                    |
| `Settings`        | a dataclass, the arguments (arguments.py)                                                           |
| `run(settings)`   | does it and returns the exit code: 0 done, 1 failed; errors.UserError ends it with 2, Ctrl-C with 130 |

`--help` imports them all, so what is heavy is imported in `run`.
"""
