"""Artifacts of `instructions tag` for tests of the tree's page."""

import json

from openqwen.instruct.collaborate.tree import TagNode, TagTree

RAW = [
    *([["Math", "Algebra"]] * 3),
    ["Math", "Maths"],
    ["Maths"],
    ["Poem", "style"],
    ["Poem"],
    ["Style!"],
]


def artifact(folder, texts=None, raw=RAW):
    """A folder with a tagged pool and its tree: math > algebra, maths, poem > style."""
    folder.mkdir()
    records = [
        {
            "id": f"i{number}",
            "prompt": [{"role": "user", "content": (texts or {}).get(number, f"Text {number}")}],
            "raw": [{"tag": form, "explanation": ""} for form in forms],
        }
        for number, forms in enumerate(raw)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "instructions.jsonl").write_text(lines)
    nodes = [
        TagNode("math", 4, None, {"Math": 4}, ["About numbers."]),
        TagNode("algebra", 3, "math", {"Algebra": 3}, ["About equations."]),
        TagNode("maths", 2, None, {"Maths": 2}),
        TagNode("poem", 2, None, {"Poem": 2}),
        TagNode("style", 2, "poem", {"style": 1, "Style!": 1}),
    ]
    TagTree({node.name: node for node in nodes}).write(folder)
    return folder
