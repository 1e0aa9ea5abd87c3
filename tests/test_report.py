"""The three files of a report: complete, self-contained, and of whatever was run."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from t2ray.core import Mixture
from t2ray.evals.evaluate import Cell, build_report
from t2ray.evals.report import html_page, text_tables, write_report
from t2ray.experts.heatmap import HeatMap

LABELS = ("math", "code", "others")
CURVES = {"math": [{"step": 0, "accuracy": 0.1, "kl": 0.0, "validation": 0.2}, {"step": 1, "accuracy": 0.5, "kl": 0.1}]}
SHIFTS = {"math": HeatMap(layers=(0, 1), kinds=("q_proj", "up_proj"), values=((0.1, 0.0), (-0.2, 0.3)))}


def cell(right, n=10, **fields):
    return Cell(task="t", correct=(True,) * right + (False,) * (n - right), **fields)


def report(**change):
    fields = {
        "trained": ["math"],
        "own": {"math": "math", "math_long": "math"},
        "singles": {
            "math": {"base": cell(1), "math": cell(9), "code": cell(0)},
            "math_long": {"base": cell(2), "math": cell(6), "code": cell(7)},
        },
        "adaptive": {
            "math": {"cls": cell(9, labels=Counter(math=9, others=1))},
            "math_long": {"fewshot": cell(8)},
        },
        "labels": LABELS,
        "others": {},
        "classifier": {"base": cell(1), "expert": cell(10)},
        "mixtures": {"math_long": Mixture.of({"math": 0.7}), "math": Mixture.of({"math": [0.5, 1.0]})},
        "experts": ["math", "code"],
        "timing_s": {"decompose": 1.0, "total": 10.0},
        "pass1_share": 0.083,
        "seed": 7,
        "machine": {"cpu": "<fast> & new", "cores": 2},
    }
    return build_report(**fields | change)


class Page(HTMLParser):
    """Collects what a page would load, and checks that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags = [], [], Counter()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.loads += [v for k, v in attrs if k in ("href", "src", "xlink:href", "srcset", "data")]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_writes_three_files_and_the_json_is_the_dictionary(tmp_path):
    made = report()
    write_report(tmp_path / "runs" / "demo", made, CURVES, SHIFTS)
    folder = tmp_path / "runs" / "demo"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(made))
    assert text_tables(made) in (folder / "report.md").read_text()


def test_the_page_loads_nothing_and_is_well_formed():
    page = html_page(report(), CURVES, SHIFTS)
    assert [x for x in Page(page).loads if not x.startswith(("#", "data:"))] == []
    assert "<script" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_the_page_has_a_figure_for_every_domain_and_expert():
    assert Page(html_page(report(), CURVES | {"code": CURVES["math"]}, SHIFTS)).tags["svg"] == 1 + 2 + 1


def test_figures_take_the_pages_colours_and_their_ids_do_not_meet():
    page = html_page(report(), CURVES | {"code": CURVES["math"]}, SHIFTS | {"code": SHIFTS["math"]})
    assert "#010203" not in page
    assert "currentColor" in page
    clips = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clips) == len(set(clips)) > 0
    assert "prefers-color-scheme: dark" in page


def test_what_comes_from_outside_is_escaped():
    page = html_page(report(), {}, {})
    assert "&lt;fast&gt; &amp; new" in page
    assert "<fast>" not in page


def test_the_same_report_gives_the_same_page():
    assert html_page(report(), CURVES, SHIFTS) == html_page(report(), CURVES, SHIFTS)


def test_tables_show_accuracy_n_and_interval_and_leave_out_what_was_not_run():
    text = text_tables(report())
    assert re.search(r"\| math +\| 10 \| +- \| +- \| +10\.0 \(2-40\) \| +90\.0 \(60-98\)", text)
    trained, unseen = text.split("## Unseen tasks")
    assert "few-shot" not in trained
    assert "few-shot" in unseen
    assert "prompt |" not in text


def test_every_row_of_a_text_table_is_as_wide_as_its_head():
    for block in text_tables(report()).split("\n\n"):
        if block.startswith("|"):
            assert len({len(line) for line in block.splitlines()}) == 1


def test_a_missed_target_is_said():
    made = report(pass1_share=0.25)
    assert re.search(r"at most +\| +0\.100 \| +0\.250 \| +NO", text_tables(made))
    assert '<span class="bad">no</span>' in html_page(made, {}, {})
    assert "Pass 1 takes 25.0%" in html_page(made, {}, {})


def test_a_report_of_nearly_nothing_still_renders(tmp_path):
    bare = report(singles={"gsm8k": {"base": cell(0)}}, adaptive={}, own={}, mixtures={}, pass1_share=None, machine="x")
    write_report(tmp_path, bare, {"math": []}, {})
    assert "0.0 (0-28)" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("values", [((0.0,), (0.0,)), ((0.1,), (0.4,)), ((-0.1,), (0.4,))])
def test_a_heat_map_of_zeros_magnitudes_or_both_signs(values):
    shifts = {"math": HeatMap(layers=(0, 1), kinds=("q_proj",), values=values)}
    assert "<svg" in html_page(report(), {}, shifts)


def test_many_layers_and_many_experts_still_draw():
    heat = HeatMap(layers=tuple(range(80)), kinds=("q", "k"), values=((0.1, 0.1),) * 80)
    mixtures = {f"task{i}": Mixture.of({f"e{j}": 0.1 for j in range(9)}) for i in range(4)}
    page = html_page(
        report(mixtures=mixtures, experts=[f"e{j}" for j in range(9)]), {}, {f"e{i}": heat for i in range(3)}
    )
    assert Page(page).tags["svg"] == 4
