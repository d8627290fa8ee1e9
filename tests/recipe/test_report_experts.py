"""The load of experts in the report."""

import json
import re

from openqwen.recipe.report import write_report
from openqwen.support.page import environment


def test_the_load_of_experts_is_drawn(tmp_path):
    stage = tmp_path / "run" / "pretrain"
    stage.mkdir(parents=True)
    manifest = {"stage": "pretrain", "kind": "pretrain", "key": "0", "digest": "ab" * 32, "seed": 1}
    manifest |= {key: {} for key in ("config", "inputs", "files", "code", "machine", "metrics")}
    manifest |= {"created": "2026-11-26T00:00:00Z", "seconds": 1.0}
    (stage / "manifest.json").write_text(json.dumps(manifest))
    step = {"step": 0, "loss": 2.0, "tokens": 512, "seconds": 0.5, "load_entropy": 0.93}
    (stage / "metrics.jsonl").write_text(
        "".join(json.dumps(step | {"step": n}) + "\n" for n in range(9))
    )
    record = {"tokens": 512, "layers": [0, 2], "load": [[1.0, 0.0, 2.5, 0.5], [1.0, 1.0, 1.0, 1.0]]}
    (stage / "experts.json").write_text(json.dumps(record))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count('<rect class="load"') == 8
    assert page.count('<line class="dead"') == 1
    assert "layer 2" in page
    assert "largest 2.50 of an even share" in page
    assert "of an even one" in page  # the curve of the entropy


def test_a_load_map_is_as_dark_as_the_load():
    draw = environment("openqwen.recipe.report").get_template("charts.html.j2").module.load_map
    cells = re.findall(r'fill-opacity="([0-9.]+)"', draw([[0.0, 1.5, 3.0, 9.0]], [1], "load"))
    assert cells == ["0.000", "0.500", "1.000", "1.000"]
