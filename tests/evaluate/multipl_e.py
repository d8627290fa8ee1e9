"""Records in the form of MultiPL-E's files: a function that doubles, in each language."""

MULTIPL_E = {
    "cpp": {
        "name": "HumanEval_0_double",
        "language": "cpp",
        "prompt": "#include<assert.h>\n// Twice x.\nlong twice(long x) {\n",
        "tests": "}\nint main() {\n    assert(twice(3) == 6);\n}\n",
        "stop_tokens": ["\n}"],
    },
    "js": {
        "name": "HumanEval_0_double",
        "language": "js",
        "prompt": "//Twice x.\nfunction twice(x){\n",
        "tests": "const assert = require('node:assert');\nassert.deepEqual(twice(3),6);",
        "stop_tokens": ["\nfunction "],
    },
    "java": {
        "name": "HumanEval_0_double",
        "language": "java",
        "prompt": "import org.javatuples.*;\nclass Problem {\n    // Twice x.\n"
        "    public static long twice(long x) {\n",
        "tests": "    }\n    public static void main(String[] args) {\n"
        "    assert(twice(3l) == 6l);\n    }\n\n}\n",
        "stop_tokens": ["\n    }\n"],
    },
    "cs": {
        "name": "HumanEval_0_double",
        "language": "cs",
        "prompt": "using System.Diagnostics;\nclass Problem {\n    // Twice x.\n"
        "    public static long Twice(long x) {\n",
        "tests": "    }\n    public static void Main(string[] args) {\n"
        "    Debug.Assert(Twice(3L) == 6L);\n    }\n\n}\n",
        "stop_tokens": ["\n    }\n"],
    },
    "php": {
        "name": "HumanEval_0_double",
        "language": "php",
        "prompt": "<?php\n// Twice x.\nfunction twice($x) {\n",
        "tests": "if (twice(3) !== 6) { throw new Exception('Test failed!'); }",
        "stop_tokens": ["\nfunction"],
    },
    "ts": {
        "name": "HumanEval_0_double",
        "language": "ts",
        "prompt": "//Twice x.\nfunction twice(x: number): number {\n",
        "tests": "declare var require: any;\nconst assert = require('node:assert');\n"
        "assert.deepEqual(twice(3),6);",
        "stop_tokens": ["\nfunction "],
    },
    "go": {"name": "HumanEval_0_double", "language": "go_test.go", "prompt": "", "tests": "",
           "stop_tokens": []},
}  # fmt: skip
