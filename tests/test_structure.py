"""The house: who may import whom, and how long things may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = (
    "reading",
    "records",
    "media",
    "video",
    "image",
    "files",
    "fields",
    "cli",
    "report",
    "strip",
    "console",
)
LAYERS = [
    ["kernels"],
    [f"nanosport.{name}" for name in BASE],
    ["nanosport.model"],
    ["nanosport.engine"],
    ["nanosport.env"],
    ["nanosport.train"],
    ["data_prep"],
    ["train", "rl", "eval", "infer", "nanosport.serve"],
    ["nanosport.plan"],
    ["nanosport.bench"],
]
"""From the bottom to the top: an import must not run uphill."""
FOLDERS = ("kernels", "nanosport", "data_prep")
FILES = sorted(
    path for part in (*FOLDERS, "") for path in (ROOT / part).glob("**/*.py" if part else "*.py")
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def layer_of(module: str) -> int | None:
    """The layer of one of our modules; None for a bare package."""
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    assert module in ("nanosport",), f"{module} has no place in LAYERS"
    return None


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names & MODULES.keys()


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def test_there_is_something_to_read():
    assert len(MODULES) > 60 and sum(map(len, IMPORTS.values())) > 150


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_uphill(module):
    mine = layer_of(module)
    if mine is not None:
        uphill = [name for name in IMPORTS[module] if (layer_of(name) or 0) > mine]
        assert not uphill, f"{module} stands below what it imports: {uphill}"


def test_the_kernels_import_nothing_of_ours():
    for module in MODULES:
        if module.startswith("kernels"):
            others = {name for name in IMPORTS[module] if not name.startswith("kernels")}
            assert not others, (module, others)


def test_no_imports_go_in_a_circle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for name in IMPORTS[module]:
                visit(name, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def num_lines(*patterns: str) -> int:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert paths, patterns
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_code_stays_small():
    """Lines of 100 columns, tests apart: whoever adds must also delete."""
    everything = ("*.py", "kernels/**/*.py", "nanosport/**/*.py", "data_prep/**/*.py")
    plan, bench = num_lines("nanosport/plan/*.py"), num_lines("nanosport/bench/*.py")
    core = num_lines("*.py", "kernels/**/*.py", "nanosport/**/*.py") - plan - bench
    assert num_lines("rl.py") <= 400 and num_lines("train.py") <= 130
    assert num_lines("nanosport/bench/train.py") <= 250
    assert plan <= 910 and core <= 13_960 and num_lines(*everything) <= 22_434


def test_the_engine_stays_small():
    """Our own sampler, and the interface that it shares with those over vLLM."""
    names = ("own", "pages", "row", "step", "sampler")
    assert num_lines(*(f"nanosport/engine/{name}.py" for name in names)) <= 759


COMMANDS = "arena check convert difficulty distill look split teacher"


@pytest.mark.parametrize("name", COMMANDS.split())
def test_help_loads_no_model(name):
    """A command that prepares data answers at once."""
    watch = "import runpy, sys; sys.argv = [sys.argv[0], '--help']\n"
    watch += f"try: runpy.run_module('data_prep.{name}', run_name='__main__')\n"
    watch += "except SystemExit as end: assert not end.code, end.code\n"
    watch += "print([m for m in sys.modules if m.startswith(('nanosport.model.', 'transformers'))])"
    done = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage" in done.stdout.lower() and done.stdout.splitlines()[-1] == "[]"


def test_functions_are_short():
    """Only the two training loops may be longer than a screen, and theirs fit one too."""
    too_long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 45 and (module, node.name) not in (("rl", "main"), ("train", "main")):
                    too_long.append(f"{module}.{node.name}: {lines} lines")
    assert not too_long


def test_the_loop_of_rl_fits_a_screen():
    """The named stages of the algorithm, and nothing between them."""
    (main,) = (
        node
        for node in ast.parse((ROOT / "rl.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    (loop,) = (node for node in main.body if isinstance(node, ast.For))
    assert loop.end_lineno - loop.lineno + 1 <= 45
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for node in ast.walk(loop)
        if isinstance(node, ast.Call)
    }
    stages = "collect check_rollouts group_advantages prepare policy_loss update publish log"
    assert set(stages.split()) <= called
