"""The page of the tree of tags with many tags: the time to open it, and of an edit and an undo.

    python benchmarks/instructions/tree_page.py [--tags 5000] [--edits 1000]

Prints one line of JSON, in milliseconds, medians: the server's work for an edit and for an undo
(which applies all edits again) after so many edits, and in Chromium (CHROMIUM or the system's) from
the address to the first row, and from a key to the answer of the server that the page shows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from openqwen.instruct.collaborate.tree import TagEdit, TagNode, TagTree
from openqwen.instruct.collaborate.tree_editor import EditRequest, TreeEditor
from openqwen.support.files import write_jsonl

TIMES = 5
WIDEST = 50  # tags at the first level


def make_artifact(folder, tags):
    """A tagged pool of one instruction a tag, and a tree of three levels."""
    folder.mkdir()
    prompts = ([{"role": "user", "content": f"Instruction {n}"}] for n in range(tags))
    lines = (
        {"id": f"i{n}", "prompt": prompt, "raw": [{"tag": f"tag {n}", "explanation": ""}]}
        for n, prompt in enumerate(prompts)
    )
    write_jsonl(folder / "instructions.jsonl", lines)
    nodes = {}
    for n in range(tags):
        level = n % WIDEST if n < 10 * WIDEST else WIDEST + n % (9 * WIDEST)
        parent = None if n < WIDEST else f"tag {level}"
        nodes[f"tag {n}"] = TagNode(f"tag {n}", 1, parent, {f"tag {n}": 1})
    TagTree(nodes).write(folder)


def timed(act):
    """Milliseconds of the median of some runs."""
    spent = []
    for number in range(TIMES):
        begun = time.perf_counter()
        act(number)
        spent.append(1000 * (time.perf_counter() - begun))
    return round(median(spent), 1)


def measure_server(folder, tags, edits):
    """The editor's work, and its start with all edits."""
    editor = TreeEditor(folder)
    count = 0

    def edit(**values):
        nonlocal count
        count += 1
        request = EditRequest(key=f"request-{count}", after=count - 1, edits=[TagEdit(**values)])
        editor.edit(request)
        return len(json.dumps(editor.state()))

    for n in range(edits):
        edit(edit="rename", tag=f"tag {tags - 1 - n}", name=f"renamed {n}")
    found = {"edit_ms": timed(lambda n: edit(edit="rename", tag=f"tag {n}", name=f"new {n}"))}
    found["undo_ms"] = timed(lambda n: edit(edit="undo", undoes=n))
    found["answer_kb"] = len(json.dumps(editor.state())) // 1000
    editor.close()
    begun = time.perf_counter()
    TreeEditor(folder).close()
    return found | {"load_ms": round(1000 * (time.perf_counter() - begun), 1)}


def measure_page(folder):
    """The page in Chromium; nothing where there is none."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        return {}
    from playwright.sync_api import sync_playwright

    words = ["instructions", "tree", str(folder), "--port", "8378"]
    server = subprocess.Popen(
        [sys.executable, "-m", "openqwen.cli", *words], stdout=subprocess.PIPE
    )
    try:
        server.stdout.readline()  # its address
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page()

            def open_page(_):
                page.goto("http://127.0.0.1:8378")
                page.locator("[role=treeitem]").first.wait_for()

            def drop(_):
                with page.expect_response(lambda one: one.url.endswith("/api/edits")):
                    page.keyboard.press("Delete")
                page.locator(f"#found:not(:has-text('{shown}'))").wait_for()

            found = {"page_open_ms": timed(open_page)}
            spent = []
            page.locator("#tree").focus()
            for _ in range(TIMES):
                shown = page.locator("#found").inner_text()
                begun = time.perf_counter()
                drop(None)
                spent.append(1000 * (time.perf_counter() - begun))
            return found | {"page_edit_ms": round(median(spent), 1)}
    finally:
        server.terminate()
        server.wait(30)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tags", type=int, default=5_000)
    parser.add_argument("--edits", type=int, default=1_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "tagged")
        make_artifact(folder, options.tags)
        result = {"tags": options.tags, "edits": options.edits}
        result |= measure_server(folder, options.tags, options.edits)
        print(json.dumps(result | measure_page(folder)))


if __name__ == "__main__":
    main()
