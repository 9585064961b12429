"""The report of a made-up run in a real browser: nothing is wider than the window, nothing is loaded."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from browser import chromium
from fedtailor import report
from test_report import HOSTILE, SAMPLE, a_result, a_run, metric

# A frame of the wanted width inside a bigger window: Chromium does not make windows narrower than about 500 px.
# The script is the frame's parent's: the page itself is measured as it was written.
MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:3000px" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
onload = () => {{
  const inside = document.getElementById("frame").contentDocument, root = inside.documentElement;
  const scrolled = element => element.closest(".scroll, pre");
  document.getElementById("found").textContent = JSON.stringify({{
    wide: root.clientWidth, content: Math.max(root.scrollWidth, inside.body.scrollWidth),
    outside: [...inside.body.querySelectorAll("*")].filter(element => !scrolled(element)
      && element.getBoundingClientRect().right > root.clientWidth + 0.5).map(element => element.outerHTML.slice(0, 80)),
    rows: inside.querySelectorAll("#quality tbody tr").length,
    plots: [...inside.querySelectorAll("svg.plot")].map(svg => svg.getBoundingClientRect().height),
    bars: inside.querySelectorAll("svg.bar").length, font: getComputedStyle(inside.body).fontSize,
    loaded: inside.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
}};
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    result = a_result()
    result["rows"]["federated"] |= {name: metric(0.1, 0.2) for name in ("rouge_l", "bleu", "exact_match", "other")}
    result["rows"]["federated"]["samples"] = [dict.fromkeys(SAMPLE, HOSTILE + "w" * 300)]
    page = report.write(a_run(tmp_path / "run", result)).read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    done = subprocess.run(
        [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )
    measured = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert measured, f"the browser rendered nothing:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    found = json.loads(html.unescape(measured[1]))
    assert found["wide"] in range(width - 20, width + 1), "less a scrollbar"
    assert found["content"] <= found["wide"]
    assert found["outside"] == []
    assert found["rows"] == 5
    assert found["bars"] == 8
    assert len(found["plots"]) == 2
    assert min(found["plots"]) > 150
    assert found["font"] == ("15px" if width == 400 else "16px"), "the page's own style is applied"
    assert found["loaded"] == []
