"""What a program may do, how its run ends, and that its tests stay its judge's."""

import os
from importlib.metadata import version

import pytest

from openqwen.sandbox import Limits, Pool, Program, best_tier, languages, run
from openqwen.sandbox.languages import Language, available
from openqwen.support.errors import OpenQwenError

pytestmark = pytest.mark.skipif(best_tier() != "strict", reason="no user namespaces here")
SHORT = Limits(seconds=1, wall_seconds=10)


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as pool:
        yield pool


def one(pool, source, **fields):
    return pool.run([Program(source, **fields)])[0]


def test_run_alone():
    verdict = run("print(input()[::-1])", stdin="abc\n", limits=SHORT)
    assert (verdict.status, verdict.stdout, verdict.stderr) == ("passed", "cba\n", "")


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("print(1)", "passed", ""),
        ("import sys; sys.exit(0)", "passed", ""),
        ("import sys; sys.exit(3)", "failed", "exit status 3"),
        ("raise SystemExit('words')", "failed", "words"),
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("def f(:", "failed", "SyntaxError"),
        ("while True: pass", "timeout", "seconds"),
        ("import time; time.sleep(60)", "timeout", "by the clock"),
        ("x = bytearray(1 << 30)", "memory", "512 MiB"),
        ("print('x' * (1 << 22))", "output", "1024 KiB"),
        ("import os; os.abort()", "crashed", "killed by SIG"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
    ],
)
def test_how_a_run_ends(pool, source, status, said):
    limits = Limits(seconds=1, wall_seconds=3)
    verdict = one(pool, source, limits=limits)
    assert (verdict.status, said in verdict.reason) == (status, True), verdict


def test_a_program_sees_a_plain_script(pool):
    source = (
        "import sys, os, atexit, threading\n"
        "atexit.register(print, 'end')\n"
        "threading.Thread(target=print, args=('thread',)).start()\n"
        "print(__name__, sys.argv, os.getcwd(), sorted(os.listdir('.')), open('a/b.txt').read())\n"
        "print(sys.stdin.read(), file=sys.stderr)\n"
    )
    verdict = one(pool, source, stdin="größe\x00", files={"a/b.txt": "é", "c.bin": b"\xff"})
    place = "['main.py'] /box/work ['a', 'c.bin'] é"
    assert verdict.stdout.splitlines()[0] in ("thread", f"__main__ {place}")
    assert set(verdict.stdout.splitlines()) == {f"__main__ {place}", "thread", "end"}
    assert verdict.stderr == "größe\x00\n"
    assert verdict.status == "passed"


def test_a_traceback_shows_the_program_alone(pool):
    verdict = one(pool, "def f():\n    return 1 / 0\nf()\n")
    assert verdict.stderr == (
        "Traceback (most recent call last):\n"
        '  File "main.py", line 3, in <module>\n    f()\n'
        '  File "main.py", line 2, in f\n    return 1 / 0\n'
        "           ~~^~~\nZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_names_of_files_stay_below(pool, name):
    with pytest.raises(OpenQwenError, match="not a valid file name"):
        one(pool, "1", files={name: ""})


def test_a_run_leaves_nothing(pool):
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        one(pool, "open('x', 'w').write('x')", tests="assert True")
        assert (
            one(pool, "import os; print(os.listdir('.'), os.listdir('/tmp'))").stdout == "[] []\n"
        )
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_killed_sandbox_is_started_anew(pool):
    one(pool, "1")
    pool._workers[0].process.kill()
    assert one(pool, "print(2)").stdout == "2\n"


TOOLS = {
    "c": '#include <stdio.h>\nint main(){int n;scanf("%d",&n);printf("%d\\n",2*n);}',
    "cpp": "#include <iostream>\nint main(){int n;std::cin>>n;std::cout<<2*n<<std::endl;}",
    "javascript": "console.log(2 * require('fs').readFileSync(0))",
    "typescript": "declare var require: any;\n"
    "const n: number = Number(require('fs').readFileSync(0));\nconsole.log(2 * n);",
    "java": "import java.util.Scanner;\nclass Twice { public static void main(String[] given) {"
    "System.out.println(2 * new Scanner(System.in).nextInt()); } }",
    "csharp": "using System;\nclass Twice { static void Main() {"
    "Console.WriteLine(2 * int.Parse(Console.ReadLine())); } }",
    "php": '<?php $n = trim(fgets(STDIN)); echo ctype_digit($n) ? 2 * $n : "?", "\\n";',
    "bash": "read n; echo $((2 * n))",
}


@pytest.mark.parametrize("language", TOOLS)
def test_languages(pool, language):
    if language not in available():
        with pytest.raises(OpenQwenError, match="is not installed"):
            one(pool, TOOLS[language], language=language)
        return
    limits = Limits(seconds=20, memory_mb=4096, processes=32)
    verdict = one(pool, TOOLS[language], language=language, stdin="21", limits=limits)
    assert (verdict.status, verdict.stdout) == ("passed", "42\n"), verdict


@pytest.mark.skipif("csharp" not in available(), reason="Mono is not installed")
def test_a_failed_assertion_of_csharp_is_a_failure(pool):
    source = "using System.Diagnostics;\nclass A { static void Main() { Debug.Assert(1 == %d); } }"
    limits = Limits(memory_mb=4096, processes=32)
    verdicts = [one(pool, source % n, language="csharp", limits=limits) for n in (1, 2)]
    assert [verdict.status for verdict in verdicts] == ["passed", "failed"]


def test_what_does_not_compile_and_what_is_unknown(pool):
    if "c" in available():
        verdict = one(pool, "int main({}", language="c")
        assert (verdict.status, verdict.reason) == ("failed", "it does not compile")
        assert "error:" in verdict.stderr
    with pytest.raises(OpenQwenError, match="Did you mean 'bash'"):
        one(pool, "", language="bsh")
    with pytest.raises(OpenQwenError, match="Tests call functions of Python programs"):
        one(pool, "", language="bash", tests="")


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "2 ** 90", "1.5", "float('inf')", "'é\\ud800'", "b'\\xff'", "1 + 2j",
        "[1, [2]]", "(1, (2,))", "{1, 2}", "frozenset({1})", "{(1, 2): [3]}", "range(3)",
        "__import__('collections').Counter('aab')", "__import__('collections').deque([1])",
        "__import__('decimal').Decimal('0.1')", "__import__('fractions').Fraction(1, 3)",
        "__import__('collections').namedtuple('P', 'x y')(1, 2)",
    ],
)  # fmt: skip
def test_values_cross_both_ways(pool, value):
    tests = f"assert f({value}) == ({value}, {value})\nassert f(0) != (0, 1)"
    verdict = one(pool, f"def f(x): return x, {value} if x != 0 else 0", tests=tests)
    assert verdict.passed, verdict


def test_objects_errors_functions_and_generators_cross_as_handles(pool):
    source = (
        "class Node:\n"
        "    def __init__(self, x): self.x, self.next = x, None\n"
        "    def __len__(self): return 3\n"
        "def total(n):\n"
        "    return n.x + (total(n.next) if n.next else 0)\n"
        "def twice(f, x): return f(f(x))\n"
        "def squares(n):\n"
        "    for i in range(n): yield i * i\n"
        "def fail(): raise KeyError('k')\n"
        "LIMIT = 3\n"
    )
    tests = (
        "root = Node(1); root.next = Node(2)\n"
        "assert total(root) == 3 and root.next.x == 2 and len(root) == 3\n"
        "assert twice(lambda x: x + 1, 0) == 2\n"
        "assert list(squares(4)) == [0, 1, 4, 9]\n"
        "assert LIMIT == 3\n"
        "try: fail()\n"
        "except KeyError as error: assert 'k' in str(error)\n"
        "else: raise AssertionError\n"
    )
    verdict = one(pool, source, tests=tests)
    assert verdict.passed, verdict


def test_a_failed_test_is_named(pool):
    verdict = one(pool, "def f(x): return x", tests="assert f(1) == 1\nassert f(2) == 3, 'two'")
    assert (verdict.status, verdict.reason) == ("failed", "a test failed: line 2 of the tests two")
    verdict = one(pool, "def g(x): return x", tests="def check(c): assert c(1) == 1", entry="f")
    assert verdict.reason == "the program has no function 'f'"


def test_modules_that_the_tests_use_are_not_the_programs(pool):
    source = "class math:\n    isclose = lambda *a: True\ndef f(x): return 0.0"
    verdict = one(pool, source, tests="assert math.isclose(f(1), 3.0)")
    assert (verdict.status, "a test failed" in verdict.reason) == ("failed", True), verdict
    verdict = one(pool, "import math\ndef f(x): return x", tests="assert math.isclose(f(3), 3.0)")
    assert verdict.passed, verdict


def test_a_sandbox_that_fails_is_no_fault_of_the_program(monkeypatch):
    with Pool(1) as pool:
        monkeypatch.setattr(languages, "language_of", lambda name: Language("m", (("gone",),), "x"))
        verdict = one(pool, "", language="bash")
        assert (verdict.status, "FileNotFoundError" in verdict.reason) == ("infra", True), verdict


def test_packages_are_let_in_by_name():
    with Pool(1, packages=("numpy",)) as pool:
        source = "import numpy\ndef f(n): return numpy.arange(n)"
        verdict = one(pool, source, tests="assert f(3) == [0, 1, 2]")
        assert verdict.passed, verdict
        assert "No module" in one(pool, "import pydantic").reason
        # Before the fork, and with the metadata in which packages look up versions.
        source = "import sys; from importlib.metadata import version; print(version('numpy'))"
        assert (
            one(pool, f"{source}; assert 'numpy' in sys.modules").stdout == f"{version('numpy')}\n"
        )
    with pytest.raises(OpenQwenError, match="No module 'nonsense' is installed"):
        Pool(1, packages=("nonsense",))


def test_verdicts_keep_the_order_of_the_programs():
    with Pool(2) as pool:
        programs = [
            Program(f"import time; time.sleep({n % 3 / 50}); print({n})") for n in range(12)
        ]
        assert [v.stdout for v in pool.run(programs)] == [f"{n}\n" for n in range(12)]
