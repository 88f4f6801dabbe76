"""The README is short, docs/ builds as a site, and links lead somewhere."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import decode_profile
from benchmarks.quality_picture import digest, main
from doc_pages import CODE, FENCE, PAGES, ROOT, blocks

README = ROOT / "README.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIGURES = ROOT / "docs" / "results" / "quality.json"


class Ids(HTMLParser):
    """The ids of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.found = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name == "id"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def links(page: Path) -> list[str]:
    """Where a page's links lead, but for other hosts."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    return [link for link in LINK.findall(text) if not re.match(r"https://", link)]


def test_the_site_has_every_page_and_fetches_nothing(site):
    for page in PAGES[1:]:
        html = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        assert not re.findall(r"<(?:script|img)[^>]+src=\"https?:|<link[^>]+stylesheet[^>]+href=\"https?:", html)


def test_links_of_the_readme_lead_to_files_and_headings(site):
    found = links(README)
    assert len(found) > 10
    for link in found:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in Ids(site / Path(path).relative_to("docs").with_suffix(".html")).found, link


def test_the_readme_is_read_in_minutes():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert max(len(line) for line in lines if line.startswith("|")) <= 100


def test_every_figure_of_the_readme_is_one_of_the_pages():
    figures = re.compile(r"\d+(?:\.\d+)*")
    pages = "\n".join(page.read_text() for page in PAGES[1:])
    assert set(figures.findall(README.read_text())) <= set(figures.findall(pages))


def test_the_plan_in_the_readme_is_that_of_its_page():
    (example,) = (block for block in blocks(README) if block.language == "console")
    page = (ROOT / "docs" / "plan.md").read_text().splitlines()
    assert all(line in page for line in example.text.splitlines())


@pytest.mark.parametrize("page", PAGES[1:], ids=[page.name for page in PAGES[1:]])
def test_a_page_begins_with_what_it_is_for(page):
    title, empty, first = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert first[0].isalnum() or first.startswith(("`", "["))


def test_the_picture_shows_the_figures_beside_it():
    assert digest(FIGURES) in FIGURES.with_suffix(".svg").read_text(), (
        f"run python -m benchmarks.quality_picture {FIGURES}"
    )


def test_the_picture_of_a_token_is_that_of_its_figures(tmp_path):
    figures = FIGURES.with_name("decode.json")
    assert digest(figures) in figures.with_suffix(".svg").read_text(), "run python -m benchmarks.decode_profile again"
    copy = tmp_path / "decode.json"
    shutil.copy(figures, copy)
    decode_profile.draw(copy)
    assert digest(copy) in copy.with_suffix(".svg").read_text()
    for row in json.loads(figures.read_text())["rows"]:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["profiled_ms"])


def test_parts_of_a_token_hold_all_of_a_profile():
    def event(key, seconds, *shapes):
        return SimpleNamespace(key=key, self_cpu_time_total=1e6 * seconds, input_shapes=shapes)

    events = [
        event("bpdq::linear", 8, [1, 64], [2, 2, 96], []),
        event("bpdq::linear", 4, [1, 64], [2, 4, 1000]),
        event("_C::cpu_attention_with_kv_cache", 2, [1, 4, 16]),
        event("aten::copy_", 1, [[8], [8]]),
    ]
    assert decode_profile.parts(events, vocabulary=1000) == {
        "Linears of the blocks": 8,
        "LM head": 4,
        "attention": 2,
        "other operations": 1,
    }


def test_a_picture_is_drawn_of_rows_of_several_models(tmp_path):
    rows = [{"model": name, "method": "bpdq", "bits_per_weight": 2.5, "kl": 0.5} for name in "ab"]
    rows.append({"model": "a", "method": "16-bit", "bits_per_weight": 16.0, "kl": 0.0})
    report = tmp_path / "two.json"
    report.write_text(json.dumps({"rows": rows}))
    assert main([str(report)]) == 0
    assert digest(report) in (tmp_path / "two.svg").read_text()
