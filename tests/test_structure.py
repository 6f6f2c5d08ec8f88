"""How the parts hang together: no import circle, no reader of another's table."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOTS = ("gpt_kernels", "tools", "benchmarks")
# who looks into dispatch's table all the same: its own tests, which play GPUs that are not there
WHITE_BOX = {"tests/test_dispatch.py", "tests/test_gpu.py", "tests/test_architectures.py", "tests/test_namesakes.py"}


def modules(root):
    """Name of every module -> its file."""
    found = {}
    for folder in ROOTS:
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path, known):
    """The modules of ours that one imports, anywhere in it, but for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(path.read_text())
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    skipped = {id(inner) for block in typing for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            # a name of a package is its module, where it has one of that name
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    # a part of a package needs not its __init__'s imports, but for the names that are asked of it
    return found & known.keys() - {name}


def circles(graph):
    """Every set of modules that import one another (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            at = stack.index(v)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for v in sorted(graph):
        if v not in index:
            visit(v)
    return found


def graph_of(root):
    known = modules(root)
    return {name: imports(name, path, known) for name, path in known.items()}


def test_no_import_circle():
    assert circles(graph_of(ROOT)) == []


@pytest.mark.parametrize("line", ["from . import b", "import gpt_kernels.b", "def f():\n    from .b import y"])
def test_a_circle_is_seen(tmp_path, line):
    for folder in ROOTS:
        (tmp_path / folder).mkdir()
    package = tmp_path / "gpt_kernels"
    (package / "__init__.py").write_text("from .a import x")
    (package / "b.py").write_text("from .a import x")
    (package / "a.py").write_text("x = 1")
    assert circles(graph_of(tmp_path)) == []
    (package / "a.py").write_text(line)
    assert circles(graph_of(tmp_path)) == [["gpt_kernels.a", "gpt_kernels.b"]]


def test_nobody_reads_anothers_table():
    """dispatch has functions for what others ask."""
    found = set()
    for folder in (*ROOTS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if re.search(r"\bdispatch\._[a-z]", path.read_text()):
                found.add(str(path.relative_to(ROOT)))
    assert found - {"tests/test_structure.py"} <= WHITE_BOX
