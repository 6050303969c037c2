"""Tests of the quality benchmark's results: the file, the statistics, docs and README."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import report, summary
from benchmarks.quality.methods import (
    REFERENCE,
    ablations,
    dense_evaluations,
    parse_method,
    standard,
)
from benchmarks.quality.prompts import CATEGORIES, prompts
from benchmarks.quality.results import common_rows, open_results, read_rows, unfinished
from jitjax.config import TransformerConfig
from jitjax.sampler.plan import PLANS

ROOT = Path(__file__).parents[2]
HEADER = {
    "split": "test",
    "side": 512,
    "guidance": 3.5,
    "weights": "abc",
    "plans": {},
    "command": "python -m benchmarks.quality --out quality.jsonl",
    "date": "2026-11-27",
    "checkpoint": "tiny",
    "device": "cpu",
    "jax": "0.10.2",
}


def make_rows(name, pictures, evaluations, every=2, psnr=30.0, seeds=(1, 2)):
    """Rows of a method: every n-th prompt is wrong, and the PSNR grows with the prompt."""
    rows = {}
    for number in range(pictures):
        for seed in seeds:
            correct = number % every != 0
            row = {"method": name, "prompt": number, "seed": seed}
            row |= {"category": list(CATEGORIES)[number % 6], "evaluations": evaluations}
            row |= {"tflops": evaluations / 10, "seconds": evaluations / 100, "dense": 0.5}
            row |= {"verdict": {"right": correct, "shape": correct, "count": True}}
            if name != REFERENCE:
                row |= {"psnr": psnr + number / 10, "ssim": 0.9}
            rows[number, seed] = row
    return rows


@pytest.fixture(scope="module")
def figures():
    """Figures of the standard list and the ablations, of made-up rows."""
    config = TransformerConfig()
    names = standard()
    rows = {}
    for i, name in enumerate([*names, *(n for n in ablations() if n not in names)]):
        method = parse_method(name)
        cost = dense_evaluations(config, method.plan, 4096, 512)
        pictures = 24 if name in names else 12
        rows[name] = make_rows(name, pictures, cost, 2 + i % 5, 20.0 + i)
    return summary.figures(HEADER, rows, names, ablations())


def test_existing_results_are_resumed(tmp_path):
    path, settings = tmp_path / "lines.jsonl", {"split": "test", "side": 512}
    plans = {"4x": "Plan(18)"}
    assert open_results(path, settings, plans, {"command": "one"}) == {}
    row = {"method": "4x", "prompt": 3, "seed": 5}
    path.write_text(path.read_text() + json.dumps(row) + '\n{"method": "dense-')
    for command in ("one", "two", "two", "one"):
        actual = open_results(path, settings, plans | {"7x": "Plan(11)"}, {"command": command})
        assert actual == {"4x": {(3, 5): row}}
    head, *rest = path.read_text().splitlines()
    plans["7x"] = "Plan(11)"
    assert json.loads(head) == settings | {"plans": plans, "command": "one && two"}
    assert rest == [json.dumps(row)]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"'side': 512}; expected .*256"):
        open_results(path, settings | {"side": 256}, plans, {"command": "one"})
    # A plan of the same name that has changed since would be mixed with its rows.
    with pytest.raises(ValueError, match=r"has '4x' as Plan\(18\); expected Plan\(13\)"):
        open_results(path, settings, {"4x": "Plan(13)"}, {"command": "one"})
    path.write_text("{")
    with pytest.raises(ValueError, match="no complete line"):
        open_results(path, settings, plans, {"command": "one"})


def test_unfinished_work_comes_in_batches_that_lack_the_same_methods():
    tasks = [(n, p, seed) for n, p in enumerate(prompts(1, seeds=2)) for seed in p.seeds]
    assert len(tasks) == 12
    wanted = {REFERENCE: tasks, "4x": tasks, "4x:grid": tasks[:4]}
    fresh = unfinished(wanted, {}, 3)
    assert [names for names, _ in fresh] == [[REFERENCE, "4x", "4x:grid"]] * 2 + [
        [REFERENCE, "4x"]
    ] * 3
    keys = [(task[0], task[2]) for _, batch in fresh for task in batch]
    assert sorted(keys) == sorted((n, seed) for n, _, seed in tasks)
    # The first batch is done, but for the ablation of its first picture.
    done = [(n, seed) for n, _, seed in tasks[:3]]
    rows = {REFERENCE: dict.fromkeys(done), "4x": dict.fromkeys(done)}
    rows["4x:grid"] = dict.fromkeys(done[1:])
    left = unfinished(wanted, rows, 3)
    lacking = {
        (names[-1], task[0], task[2]) for names, batch in left for task in batch if len(names) == 1
    }
    assert lacking == {("4x:grid", *done[0])}
    assert sum(len(batch) for _, batch in left) == 10
    assert unfinished(wanted, {name: dict.fromkeys(keys) for name in wanted}, 3) == []


def test_differences_are_paired():
    rows = {
        REFERENCE: make_rows(REFERENCE, 20, 50, every=2),
        "4x": make_rows("4x", 22, 11, every=4, psnr=22),
        "dense-11-beta-multistep": make_rows("dense-11-beta-multistep", 20, 11, 5, psnr=35),
        "dense-11-beta": make_rows("dense-11-beta", 20, 11, every=2, psnr=33),
        "multistep-12": make_rows("multistep-12", 20, 12, 20),
        "dense-28-beta-multistep": make_rows("dense-28-beta-multistep", 20, 28, 20),
    }
    actual = summary.figures(HEADER, rows, list(rows), [])
    assert actual["pictures"] == 40  # those that all methods have
    assert "ablations" not in actual
    methods = actual["methods"]
    assert next(iter(methods)) == REFERENCE
    plan = methods["4x"]
    assert plan["right"]["mean"] == pytest.approx(0.75)
    assert plan["against_reference"]["mean"] == pytest.approx(0.25)
    low, high = plan["against_reference"]["interval"]
    assert low < 0.25 < high
    # The interval of the difference is that of 20 prompts, of which 5 differ.
    assert 0.2 < high - low < 0.45
    assert (plan["fewer_flops"], plan["faster"]) == pytest.approx((50 / 11, 50 / 11))
    assert plan["wrong"] == {"shape": 10}
    assert plan["against_multistep"]["method"] == "dense-11-beta-multistep"
    assert plan["against_multistep"]["right"]["mean"] == pytest.approx(-0.05)
    # Both PSNRs grow alike with the prompt: paired, the difference has no spread.
    assert plan["against_multistep"]["psnr"]["interval"] == pytest.approx((-13, -13))
    euler = methods["dense-11-beta"]
    assert euler["against_multistep"]["right"]["mean"] == pytest.approx(-0.3)
    # Dense steps of other sigmas are as good a rival; the nearest is taken.
    assert methods["multistep-12"]["against_multistep"]["method"] == "dense-11-beta-multistep"
    assert methods["dense-11-beta-multistep"]["against_multistep"]["method"] == "multistep-12"
    for name in (REFERENCE, "dense-28-beta-multistep"):
        assert "against_multistep" not in methods[name]
    with pytest.raises(ValueError, match="no picture was sampled by all of 4x, 7x"):
        common_rows(rows, ["4x", "7x"])


def test_page_has_every_method_and_keeps_the_text_above(figures):
    page = report.fill_page("", figures)
    assert page.startswith(report.TITLE)
    for name in figures["methods"]:
        assert f"| `{name}` |" in page
    assert "nothing changed" in page
    assert "| no lift |" in page
    assert figures["pictures"] == 48
    assert figures["ablations"]["pictures"] == 24
    assert "24 pictures each" in page
    written = "# Findings\n\nBy hand.\n\n"
    again = report.fill_page(page.replace(report.TITLE, written, 1), figures)
    assert again == page.replace(report.TITLE, written, 1)
    changed = json.loads(json.dumps(figures))
    changed["methods"]["4x"]["against_multistep"]["psnr"]["mean"] -= 1
    assert report.fill_page(page, changed) != page
    tables = [block for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for block in tables:  # every row has as many cells as its header
        assert len({line.count("|") for line in block.strip().split("\n")}) == 1


def test_readme_table_has_at_most_ten_rows(figures):
    summaries = figures["methods"]
    assert report.readme_methods(summaries) == list(summaries)
    assert len(summaries) == 9
    # With more methods, plans and what they are compared with come first.
    more = {f"dense-{n}-beta": summaries[REFERENCE] for n in (30, 20)} | summaries
    more |= {"teacache-7": summaries["7x"]}
    names = report.readme_methods(more)
    assert len(names) == 10
    assert set(summaries) | {"dense-30-beta"} == set(names)
    for plan in ("4x", "7x", "jit-10x", "jit-14x"):
        assert summaries[plan]["against_multistep"]["method"] in names
    text = f"Before\n\n{report.README_HEADER}\n|---|\n| old |\n\nafter"
    filled = report.fill_readme(text, figures)
    assert filled.count("\n| ") == 10
    assert "old" not in filled
    assert filled.startswith("Before\n\n")
    assert filled.endswith("|\n\nafter")
    assert report.fill_readme(filled, figures) == filled
    for wrong in ("", text + "\n" + report.README_HEADER):
        with pytest.raises(ValueError, match=r"the README has [02] lines"):
            report.fill_readme(wrong, figures)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (REFERENCE, ["`dense`", "50, Euler", "all", "1.0"]),
        ("multistep-12", ["**`multistep-12`**, the default", "12, second order", "all", "4.2"]),
        ("jit-14x", ["`jit-14x`", "7, second order", "25 %, all", "14.5"]),
        ("dense-25", ["`dense` with 25 steps", "25, Euler", "all", "2.0"]),
        ("teacache-10", ["`teacache-10`", "28, Euler", "all", "5.0"]),
    ],
)
def test_words_of_a_row_of_the_readme(name, words):
    assert report.readme_words(name) == words


def test_docs_are_written(figures, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.README_HEADER}\n")
    report.write_docs(figures, tmp_path, readme)
    read = json.loads((tmp_path / "quality.json").read_text())
    assert (tmp_path / "quality.md").read_text() == report.fill_page("", read)
    assert readme.read_text() == report.fill_readme(f"{report.README_HEADER}\n", read)
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "quality.png").stat().st_size < 200_000


def test_docs_have_the_figures_of_the_json_file():
    figures = json.loads((ROOT / "docs/quality.json").read_text())
    page = (ROOT / "docs/quality.md").read_text()
    assert report.fill_page(page, figures) == page
    assert set(PLANS) - {"dense"} <= set(figures["methods"])
    text = (ROOT / "README.md").read_text()
    assert report.README_HEADER in text
    assert report.fill_readme(text, figures) == text


def test_the_plot_groups_methods_by_tokens_and_solver():
    groups = {
        "4x": "sparse stages, Euler",
        "jit-10x": "sparse stages, multistep",
        "multistep-12": "all tokens, multistep",
        "dense-5-beta-multistep": "all tokens, multistep",
        "dense-28": "all tokens, Euler",
        "teacache-7": "TeaCache",
    }
    assert {name: report.family(name) for name in groups} == groups


def test_incomplete_last_line_is_ignored(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = make_rows("4x", 2, 11, seeds=(1,))
    lines = [HEADER, *rows.values()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"method": "4')
    assert read_rows(path) == (HEADER, {"4x": rows})
