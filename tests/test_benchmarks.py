"""The benchmarks: every suite runs, wrong results are noticed, generated pages are current, what pages name exists."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from introspection import needs_introspection

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "benchmarks").rglob("*.md"))
SUITES = (
    "peers",
    "extra",
    "sweep",
    "few",
    "varlen",
    "gqa",
    "window",
    "deterministic",
    "mask",
    "decode",
    "fp32",
    "host",
)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def tables(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("tables")


def _small(problem: Any) -> Any:
    """A sixteenth of the lengths, few heads."""
    group = problem.heads // problem.kv_heads
    return replace(
        problem,
        seqlen=max(16, problem.seqlen // 16) if problem.seqlen > 16 else problem.seqlen,
        batch=len(problem.lengths) or min(problem.batch, 2),
        heads=group,
        heads_k=1 if group > 1 else 0,
        window=problem.window // 16 if problem.window >= 0 else -1,
        lengths=tuple(max(1, length // 16) for length in problem.lengths),
    )


def _arguments(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", "--rounds", "1", *words])
    return bench.parse_arguments()


@needs_introspection
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs(suite: str, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, shapes, report, timing = map(module, ("bench", "shapes", "report", "timing"))
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(timing, "HOST_CALLS", 1)
    monkeypatch.setattr(bench.Peaks, "of", lambda self, dtype: report.Peak(1.0, None))
    monkeypatch.setattr(bench.Peaks, "read_gbps", lambda self: 1.0)
    args = _arguments(bench, monkeypatch, "--suite", suite)
    assert tuple(shapes.SUITES) == SUITES
    problems = list(dict.fromkeys(_small(p) for p in shapes.problems_of(suite, shapes.Selection.of_arguments(args))))
    with timing.ClockLog(enabled=False) as clock:
        for problem in problems:
            rows = bench.measure(problem, args, bench.Peaks(torch.device("cpu"), clock), clock)
            passes = {"host": bench.HOST_PASSES, "decode": ("fwd",)}.get(suite, ("fwd", "bwd"))
            assert [row["pass"] for row in rows] == list(passes)
            for row in rows:
                assert row["ours_ms"] > 0 and "from" in row["agreement"]
                assert problem.case == module("tables").case_of(row)
                assert "ours" in report.row_text(problem, row)


@pytest.mark.parametrize("case", ["none", "random", "padding", "bias", "tril", "prefix", "softcap", "alibi", "dropout"])
def test_a_wrong_result_ends_the_run(case: str, module: Callable[[str], ModuleType]) -> None:
    agreement, backends, inputs, problem = map(module, ("agreement", "backends", "inputs", "problem"))
    which = "score" if case in problem.SCORES[1:] else "mask"
    small = problem.Problem(16, False, 256, 2, 2, "fp32", **{which: case})
    given = inputs.Inputs(small, torch.device("cpu"))
    mine = backends.ours(given)
    agreement.check([mine], given, train=True)  # without another: with a head in float32, or with the mean
    right = mine.call
    mine.call = lambda: 1.2 * right()
    with pytest.raises(SystemExit, match="WRONG RESULT"):
        agreement.check([mine], given, train=False)
    mine.call, out_only = right, mine.common
    taken = []

    def wrong_gradients(x: torch.Tensor) -> torch.Tensor:
        taken.append(x)
        return out_only(x) * (1.0 if len(taken) == 1 else 1.2)

    mine.common = wrong_gradients
    with pytest.raises(SystemExit, match=r"WRONG RESULT: .*dq"):
        agreement.check([mine], given, train=True)


@pytest.mark.parametrize("case", ["causal", "padding", "documents", "tril", "window", "prefix", "softcap", "alibi"])
def test_flex_attention_is_told_the_same_problem(
    case: str, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled, which is slow but the same."""
    agreement, backends, inputs, problem = map(module, ("agreement", "backends", "inputs", "problem"))
    monkeypatch.setattr(backends, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(backends, "compiled", lambda function: function)
    which = {"causal": {"causal": True}}.get(case, {"score" if case in problem.SCORES else "mask": case})
    small = problem.Problem(16, **{"causal": False, **which}, seqlen=256, batch=2, heads=2, dtype="fp32")
    given = inputs.Inputs(small, torch.device("cpu"))
    able = [backends.ours(given), backends.flex(given)]
    for leaf in able[1].leaves:
        leaf.requires_grad_(False)  # on the CPU it has no backward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        text = agreement.check(able, given, train=False)
    assert text.endswith("from flex")


def test_visible_pairs_are_those_of_the_mask(module: Callable[[str], ModuleType]) -> None:
    inputs, problem = map(module, ("inputs", "problem"))
    for case in ("padding", "documents", "tril", "window", "prefix"):
        p = problem.Problem(8, False, 512, 4, 1, "fp32", mask=case)
        mask = inputs.Inputs(p, torch.device("cpu")).mask
        seen = int(mask.expand(p.batch, 1, p.seqlen, p.seqlen).sum())
        assert p.visible_pairs == pytest.approx(seen, rel=0.01), case


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_a_cpus_peak_is_that_of_the_dtype_it_multiplies(
    capability: str, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = module("bench")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    measured = []
    monkeypatch.setattr(bench.timing, "matmul_tflops", lambda device, dtype: measured.append(dtype) or 1.0)
    with bench.timing.ClockLog(enabled=False) as clock:
        peaks = bench.Peaks(torch.device("cpu"), clock)
        for dtype in ("fp32", "fp16", "bf16"):
            peaks.of(dtype)
    assert measured == [torch.float32, torch.bfloat16][: 1 + (capability == "AVX512")]


def test_what_a_suite_has_is_said_when_nothing_is_chosen(module: Callable[[str], ModuleType]) -> None:
    shapes = module("shapes")
    selection = shapes.Selection(on_cuda=True, seqlens=[96], cases=["dropout"])
    with pytest.raises(
        SystemExit, match=r"on CUDA it has head dims 64, 128, 256; lengths 64, 4096, 16384; full; cases random"
    ):
        shapes.problems_of("mask", selection)
    chosen = shapes.problems_of("mask", replace(selection, seqlens=None, head_dims=[64]))
    assert [(p.head_dim, p.case, p.batch, p.heads, p.seqlen) for p in chosen] == [(64, "dropout", 4, 32, 4096)]


def test_backward_of_a_compiled_peer_is_taken_again_and_again(module: Callable[[str], ModuleType]) -> None:
    compiled = module("backends").compiled(lambda q, k: (q @ k.mT).exp() @ k, backend="aot_eager")
    q, k = (torch.randn(2, 8, 8, requires_grad=True) for _ in range(2))
    torch.autograd.grad(compiled(q, k).sum(), (q, k))  # how it is tried first
    out = compiled(q, k)
    first, second = (torch.autograd.grad(out, (q, k), torch.ones_like(out), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_are_merged_by_medians(module: Callable[[str], ModuleType]) -> None:
    merge, tables, report = map(module, ("merge", "tables", "report"))
    row = {"pass": "host_fwd", "head_dim": 64, "seqlen": 128, "batch": 1, "heads": 1, "dtype": "bf16", "mask": "none"}
    row |= {"heads_k": 1, "causal": False, "window": -1, "lengths": [], "unsuited": {}}
    contents = [
        {
            "header": report.header(torch.device("cpu")),
            "rows": [row | {"ours_ms": ms, "flash_ms": 2.0, "ratio_flash": 2 / ms}],
        }
        for ms in (1.0, 4.0, 2.0)
    ]
    content = merge.merged(contents)
    assert content["rows"][0]["ours_ms"] == 2.0 and content["rows"][0]["range_flash"] == [0.5, 2.0]
    text = "\n".join(tables.timing_section("host_fwd", content))
    assert "x1.000 (0.50 to 2.00)" in text and "medians of 3 processes" in text
    contents[1]["rows"][0]["seqlen"] = 256
    with pytest.raises(SystemExit, match="different rows"):
        merge.merged(contents)


def test_models_train_alike(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    models, tables = module("models"), module("tables")
    monkeypatch.setattr(module("timing"), "SHORTEST_SAMPLE", 0.0)
    rows = []
    for name, shape in models.MODELS.items():
        small = replace(shape, width=8 * shape.heads, batch=2, seqlen=24, layers=2)
        rows.append(models.measure(name, small, torch.device("cpu"), 1))
        assert rows[-1]["agreement"] < 1e-4 or shape.dropout
    sizes = {"steps": 3, "batch": 2, "context": 24, "width": 16, "heads": 2, "layers": 1}
    rows.append(models.measure_train_gpt(torch.device("cpu"), **sizes))
    assert rows[-1]["agreement"] < 1e-4
    content = {"header": module("report").header(torch.device("cpu")), "rows": rows}
    lines = [line for line in tables.models_section("models", content) if "2 x 24" in line]
    assert len(lines) == len(rows)


def test_models_that_differ_are_noticed(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    models = module("models")
    small = replace(models.MODELS["vit"], width=96, batch=1, seqlen=24, layers=1)
    monkeypatch.setattr(models.flash_attn, "replace_sdpa", _halved_sdpa)
    with pytest.raises(SystemExit, match="WRONG RESULT"):
        models.measure("vit", small, torch.device("cpu"), 1)


@contextlib.contextmanager
def _halved_sdpa() -> Iterator[None]:
    right = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *a, **k: 0.5 * right(*a, **k)
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = right


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_a_plot_shows_its_title_and_legend(columns: int, module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name in ("forward", "backward"):
        content = json.loads((ROOT / f"benchmarks/results/h200/{name}.json").read_text())
        groups = sorted({(row["head_dim"], row["causal"]) for row in content["rows"]})[:columns]
        content["rows"] = [row for row in content["rows"] if (row["head_dim"], row["causal"]) in groups]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    figure = module("plot").compose(tmp_path)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    for shown in (figure._suptitle, *figure.legends):
        box = shown.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height


def test_results_of_a_tree_without_git_have_tables_too(tables: ModuleType) -> None:
    content = json.loads((ROOT / "benchmarks/results/h200/forward.json").read_text())
    assert tables.taken(content["header"]).startswith(f"commit {content['header']['commit'][:7]}, ")
    assert tables.taken(content["header"] | {"commit": None}).startswith("commit unknown, ")


def test_generated_pages_are_current(tables: ModuleType) -> None:
    assert tables.outdated() == [], "run python benchmarks/tables.py"


def test_a_changed_result_is_noticed(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results/h200"
    folder.mkdir(parents=True)
    text = (ROOT / "benchmarks/results/h200/forward.json").read_text()
    (folder / "forward.json").write_text(text)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/README.md").write_text("# Experiments\n\n" + tables.INDEX + "\n")
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path)
    for path, page in tables.pages():
        path.write_text(page)
    assert tables.outdated() == []
    (folder / "forward.json").write_text(text.replace('"ratio_cudnn": 1.', '"ratio_cudnn": 2.', 1))
    assert tables.outdated() == [folder / "tables.md"]


def test_a_page_without_its_two_first_lines_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Experiments\n")
    (tmp_path / "001-idea.md").write_text("# 001 An idea\n\nTopic: none of these. Verdict: kept.\n")
    with pytest.raises(SystemExit, match=r"001-idea\.md: a page begins"):
        tables.experiments_page(tmp_path)


def test_two_pages_of_one_number_are_refused(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Experiments\n")
    for name in ("idea", "other"):
        (tmp_path / f"001-{name}.md").write_text(f"# 001 An idea\n\nTopic: {tables.TOPICS[0]}. Verdict: kept.\n")
    with pytest.raises(SystemExit, match=r"001-other\.md: 001-idea\.md has that number"):
        tables.experiments_page(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files, and to headings within them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    named = re.findall(r"`((?:csrc|flash_attn|tests|examples|benchmarks)/[\w./*-]*)`", page.read_text())
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_experiments_that_the_code_names_have_pages() -> None:
    pages = {page.name[:3] for page in (ROOT / "benchmarks/experiments").glob("[0-9]*.md")}
    for path in (ROOT / "csrc").rglob("*.*"):
        for text in re.findall(r"benchmarks/experiments/(\d+(?: and \d+)*)", path.read_text()):
            assert set(text.split(" and ")) <= pages, f"{path}: {text}"
