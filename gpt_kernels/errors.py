"""What a user can mend: said in one line, without a traceback."""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """A command that raises it prints its text alone and ends with exit code 2."""


def need(extra: str, *packages: str) -> None:
    """Raises UserError where one is not installed; `extra` of ours installs them all."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'gpt-kernels[{extra}]'")
