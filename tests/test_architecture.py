"""Rules of the source: imports go one way, names are unique, files stay small, nothing is unsafe."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "src").rglob("*.py"))
OTHERS = [
    p
    for p in sorted((ROOT / "src").rglob("*"))
    if p.suffix in (".cpp", ".h", ".js", ".css", ".html", ".j2")
]
LONGEST_FILE = 500
WIDEST_LINE = 100
# The budget of all rooms is 34,000 lines and is exceeded (docs/log.md). No room may grow; lower its
# number with every line that is deleted.
LONGEST_ROOMS = {
    ".": 480,
    "corpus": 5_062,
    "engine": 3_864,
    "evaluate": 4_847,
    "http": 776,
    "instruct": 11_834,
    "model": 5_379,
    "recipe": 3_315,
    "sandbox": 2_721,
    "serve": 3_435,
    "support": 2_459,
    "tasks": 3_594,
    "tokenizer": 2_615,
    "train": 10_042,
}
MODULES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def test_imports_follow_the_layers():
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_and_package_stay_small():
    texts = {path: path.read_text(encoding="utf-8") for path in [*FILES, *OTHERS]}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    assert {str(p): n for p, n in lines.items() if n > LONGEST_FILE} == {}
    rooms: Counter[str] = Counter()
    for path in FILES:
        inside = path.relative_to(ROOT / "src" / "openqwen")
        rooms[inside.parts[0] if len(inside.parts) > 1 else "."] += lines[path]
    assert {room: n for room, n in rooms.items() if n > LONGEST_ROOMS.get(room, 0)} == {}


def test_lines_fit_an_editor():
    """Ruff holds Python files to the same width."""
    wide = []
    for path in OTHERS:
        lines = path.read_text(encoding="utf-8").splitlines()
        wide += [f"{path}:{n}" for n, line in enumerate(lines, 1) if len(line) > WIDEST_LINE]
    assert wide == []


def test_no_two_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    shared = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert shared == {}


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count; those under `if TYPE_CHECKING` do not."""
    waiting = {module: imported_by(path) - {module} for module, path in MODULES.items()}
    # Take away modules whose imports are all taken away, until only circles and their users stay;
    # then the same from the other side, until only circles stay.
    while free := {module for module, imports in waiting.items() if not imports & waiting.keys()}:
        waiting = {module: waiting[module] for module in waiting.keys() - free}
    while used := set().union(*waiting.values()) & waiting.keys():
        if used == waiting.keys():
            break
        waiting = {module: waiting[module] for module in used}
    assert {module: sorted(imports & waiting.keys()) for module, imports in waiting.items()} == {}


def imported_by(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports of this package are absolute"
            for alias in node.names:  # a module of a package, or something that a module defines
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)
    return names & MODULES.keys()


def test_nothing_is_unpickled_or_run_from_text():
    unsafe = re.compile(
        r"import pickle|pickle\.load|torch\.load\b|yaml\.load\(|(?<![.\w])(eval|exec)\("
    )
    found = [
        f"{p.name}: {m.group()}"
        for p in FILES
        for m in unsafe.finditer(p.read_text(encoding="utf-8"))
    ]
    # The sandbox runs programs and their tests: in processes that have given up everything.
    assert found == ["checker.py: exec(", *["program.py: exec("] * 2]


def test_no_mark_of_unfinished_work():
    marks = re.compile(r"# *(TODO|FIXME|XXX)|NotImplementedError")
    assert [str(p) for p in FILES if marks.search(p.read_text(encoding="utf-8"))] == []


def test_importing_the_package_loads_no_torch():
    code = "import sys, openqwen, openqwen.cli; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_network_needs_no_compiler():
    """PyTorch's, which takes more than a second to import."""
    code = (
        "import sys, openqwen.model, openqwen.train.trainer; raise SystemExit('torch._dynamo' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_dependency_has_its_line_of_why():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([A-Za-z0-9-]+)[>=]', text.split("[project.scripts]")[0])
    why = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    assert [name for name in listed if f"`{name}`".lower() not in why] == []
