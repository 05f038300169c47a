"""The pages in a real, headless Chromium: the report's draws, answers to keys, and no script fails; a plan's is no wider than its window.

`make report-test` runs this.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
from tests.cli.test_comparison import answer, chosen_by
from tests.report.timelines import ABOUT, timeline

from shardstage.cli.plan_page import answer_page
from shardstage.report import report_page

# What a reader does, and what is to be seen then, written into the page's title.
PROBE = """
<script>
window.addEventListener("error", e => { document.title = "FAILED " + e.message; });
const key = k => document.getElementById("grid").dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
setTimeout(() => {
  const canvas = document.getElementById("grid");
  const pixels = c => new Set(c.getContext("2d").getImageData(0, 0, c.width, c.height).data).size;
  const seen = {figures: document.querySelectorAll(".figure").length, rows: document.querySelectorAll("#ranks tbody tr").length,
    acts: document.querySelectorAll("#comparison tbody tr").length, colours: pixels(canvas) > 20,
    memory: pixels(document.getElementById("memory")) > 10};
  const before = view.to - view.from; key("+"); seen.zoom = (view.to - view.from) < before; key("0"); seen.whole = view.from === 0;
  key("n"); key("n"); seen.act = document.getElementById("here").textContent; key("ArrowDown"); seen.row = view.row;
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  document.title = "SEEN " + JSON.stringify(seen);
}, 1000);
</script>
"""


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("no chromium on this machine: apt-get install chromium")
    return found


def seen(page: str, folder: Path, *options: str) -> str:
    return title_of(page.replace("</body>", f"{PROBE}</body>"), folder, *options)


def title_of(page: str, folder: Path, *options: str) -> str:
    """What a page's own scripts made of its title."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [
        chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000",
        *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    return title.group(1).replace("&quot;", '"')


@pytest.mark.parametrize("size", ["1280,900", "700,900"])
def test_a_reader_sees_and_moves_a_small_run(tmp_path: Path, size: str) -> None:
    page = report_page(ABOUT, [timeline(), timeline("measured", slower=1.25)])
    found = seen(page, tmp_path, f"--window-size={size}")
    assert found.startswith("SEEN "), found
    for part in (
        '"rows":6',
        '"acts":7',
        '"colours":true',
        '"memory":true',
        '"zoom":true',
        '"whole":true',
        '"wide":true',
    ):
        assert part in found, (part, found)
    assert "rank 0: 0F1 (forward)" in found


def test_a_thousand_ranks_of_few_kinds_are_drawn(tmp_path: Path) -> None:
    found = seen(report_page(ABOUT, [timeline(alike=342)]), tmp_path, "--window-size=1280,900")
    assert '"rows":3' in found and '"colours":true' in found


# A window is no narrower than 500 pixels, a frame in it may be.
FRAME = """<!doctype html><title></title><body><iframe width="{width}" height="900" srcdoc="{page}"></iframe><script>
setTimeout(() => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const tables = [...inside.querySelectorAll("table")].map(table => table.rows.length);
  const boxes = inside.querySelectorAll("rect").length, points = inside.querySelectorAll("circle").length;
  document.title = "SEEN " + JSON.stringify({{wide: root.scrollWidth <= {width}, tables, boxes, points}});
}}, 1000);
</script></body>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_a_plan_is_no_wider_than_its_window(tmp_path: Path, width: int) -> None:
    """Pictures of many ranks and tables of long plans move within their own frames."""
    chosen, comparison = chosen_by("time")
    whole = answer(chosen, comparison, notes=("a note with words " * 30,), explained="a long line " * 90)
    page = FRAME.format(width=width, page=escape(answer_page(whole)))
    found = title_of(page, tmp_path, "--window-size=1400,1000")
    assert '"wide":true' in found and '"boxes":8' in found, found
    assert f'"points":{len(comparison.front)}' in found
    rows = (whole.less_memory(), whole.runners_up(), whole.why_not(is_whole=True), whole.counted())
    assert f'"tables":[{",".join(str(1 + len(told.rows)) for told in rows)}]' in found
