"""Languages beside Python: the file that a program is written to, and the commands that run it."""

import shutil
from dataclasses import dataclass

from openqwen.support.errors import OpenQwenError, suggestion


@dataclass(frozen=True)
class Language:
    """file: where the program is written. commands: run one after another; the last one is the
    program, those before it compile. tool: what must be installed below /usr.
    """

    file: str
    commands: tuple[tuple[str, ...], ...]
    tool: str


# Mono continues after a failed Debug.Assert. It writes of it only where this variable is set.
_MONO = """
MONO_TRACE_LISTENER=Console.Error mono main.exe 2> errors
status=$?
cat errors >&2
if grep -q DefaultTraceListener.Fail errors; then status=1; fi
exit $status
"""
# A heap of a quarter of the machine's memory, Java's default, does not fit in the sandbox.
_JAVA = ("java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-ea")
TABLE = {
    "c": Language("main.c", (("cc", "-O2", "-o", "main", "main.c", "-lm"), ("./main",)), "cc"),
    "cpp": Language("main.cpp", (("c++", "-O2", "-o", "main", "main.cpp"), ("./main",)), "c++"),
    "javascript": Language("main.js", (("node", "main.js"),), "node"),
    "typescript": Language(
        "main.ts", (("tsc", "--target", "esnext", "main.ts"), ("node", "main.js")), "tsc"
    ),
    "java": Language(  # the first class of the file is the program
        "Main.java", ((*_JAVA, "-cp", "/usr/share/java/javatuples.jar", "Main.java"),), "javac"
    ),
    "csharp": Language(
        "main.cs",
        (("mcs", "-d:DEBUG", "-r:System.Numerics.dll", "main.cs"), ("sh", "-c", _MONO)),
        "mcs",
    ),
    "php": Language("main.php", (("php", "main.php"),), "php"),
    "bash": Language("main.sh", (("bash", "main.sh"),), "bash"),
}


def available() -> list[str]:
    """Python, and the languages whose tools are installed where the sandbox sees them."""
    return ["python", *(name for name, language in TABLE.items() if _installed(language))]


def language_of(name: str) -> Language:
    """An entry of the table. Raises OpenQwenError where it is unknown or not installed."""
    if name not in TABLE:
        known = ["python", *TABLE]
        raise OpenQwenError(
            f"The sandbox has no language '{name}'.{suggestion(name, known)}",
            do=f"take one of {', '.join(known)}",
        )
    if not _installed(TABLE[name]):
        raise OpenQwenError(
            f"'{TABLE[name].tool}' is not installed below /usr: there is no {name} here.",
            do="install it by the system's packages",
        )
    return TABLE[name]


def _installed(language: Language) -> bool:
    return shutil.which(language.tool, path="/usr/local/bin:/usr/bin:/bin") is not None
