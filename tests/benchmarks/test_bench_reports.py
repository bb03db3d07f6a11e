"""From a result to Markdown, README and pictures."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET

import pytest
import synthetic_results as synthetic

from bench.counted import ladder
from bench.report import formats, plot, schema
from bench.report import markdown as report
from bench.report import tables as report_tables


@pytest.fixture(scope="module")
def full():
    return synthetic.full()


@pytest.fixture(scope="module")
def text(full):
    return report.markdown(full)


def section(text, title):
    """What is between a heading and the next one."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


# -- Formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0, "0"),
        (9.996, "10.0"),
        (0.9996, "1.00"),
        (1234.5, "1230"),
        (0.01236, "0.0124"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, expected):
    assert formats.number(value) == expected


def test_units():
    assert formats.microseconds(2.5e-3) == "2500"
    assert formats.rate(3.6e12, "copy") == "3600 GB/s"
    assert formats.rate(6.12e14, "matmul") == "612 TFLOP/s"
    assert formats.times(1.0) == "1.00×" and formats.times(0.5) == "**0.500×**"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"rows": 3, "cols": 40}, "3 × 40"),
        ({"rows": 3, "cols": 40, "k": 5, "transposed": 1}, "3 × 40, k 5, transposed"),
        ({"rows": 3, "cols": 40, "k": 5, "ascending": 1}, "3 × 40, k 5, ascending"),
        ({"segments": 3, "cols": 40}, "segments 3, cols 40"),
        (
            {"heads": 8, "kv_heads": 8, "seqlen_q": 64, "seqlen_k": 64, "causal": 1},
            "heads 8, seqlen 64, causal",
        ),
        (
            {"heads": 8, "kv_heads": 2, "seqlen_q": 1, "seqlen_k": 64, "causal": 0},
            "heads 8, kv_heads 2, seqlen_q 1, seqlen_k 64",
        ),
    ],
)
def test_shapes(sizes, expected):
    assert formats.shape(sizes) == expected


def test_plans_lose_the_types_of_the_operation():
    kernels = ["rows<Forward<float, 1>, 512, 4>", "merge<int, 4>", "plain"]
    assert formats.plan(kernels) == "`rows<512, 4>` + `merge<int, 4>` + `plain`"
    assert formats.plan(None) == "–"


def test_text_of_others_cannot_break_a_table():
    assert formats.escape("a |\n b\t<!-- end -->") == "a \\| b &lt;!-- end -->"
    assert len(formats.escape("x" * 1000)) < 310


# -- The report --------------------------------------------------------------------------------


def test_the_report_begins_with_the_machine_and_what_failed(text):
    head = text.partition("## Ceilings")[0]
    for expected in ("NVIDIA Test GPU", "compute capability 9.0", "CUDA 13.0", "commit 0123456"):
        assert expected in head
    assert head.index("| tests | **timeout** | 30.0 | a \\| b c |") < head.index(
        "| benchmarks | ok"
    )
    assert "## 1 of 70 cells without a correct cuattn\n" in head
    assert "- softmax_topk 64 × 201088, k 5 float32: **wrong**: indices differ\n" in head


def test_the_report_has_the_figures(text):
    """Each line by hand: 2 * 65536 * 1024 * 2 bytes at 0.9 * 4 TB/s, and so on."""
    assert "| copy | 4000 GB/s |" in section(text, "Ceilings")
    assert "| matmul | 800 TFLOP/s |" in section(text, "Ceilings")
    assert (
        "| 65536 × 1024 | bfloat16 | `softmax_rows<512, 1>` | 74.6 | 65.6–85.0 | 37.3 | 3600 GB/s "
        "| 90 % | 2.0e-07 / 1.0e-06 | `torch.compile` 2.00× |\n"
    ) in section(text, "softmax, quack")
    assert "| 256 × 262144 | float32 |" in section(text, "softmax, quack")
    assert "`torch.compile` **0.800×** |" in section(text, "softmax, quack")
    attention = section(text, "attention, flash-attention")
    assert "| 320 TFLOP/s | 40 % |" in attention and "`flash_attn` 1.10× |" in attention


def test_the_report_compares_with_every_peer(text):
    comparison = section(text, "Comparison")
    assert "Ahead of every peer in 67 of 70 cells that a peer ran (warm L2 cache: 67 of 70)" in (
        comparison
    )
    # 20 of 22 cells: 19 by 2, one by 0.8; 2 ** 0.95 * 0.8 ** 0.05 = 1.910
    assert (
        "| `torch.compile` | 20 | 1.91× | softmax 256 × 262144 float32: **0.800×** | 2 | 0 |"
        in (comparison)
    )
    assert "| `cupyx` | 20 | 4.00× |" in comparison
    assert "| `softmax` | 22 | 0 | 21 of 22 | 2.04× |" in comparison
    assert "| `softmax_topk` | 12 | 1 | 10 of 12 |" in comparison
    behind = comparison.partition("Behind the best peer in:")[2]
    assert behind.index("k 5 float32: **0.500×**, `torch`") < behind.index("**0.800×**")


def test_what_is_not_ok_is_named_with_its_cells_and_has_no_ratio(text):
    table = section(text, "softmax, quack")
    hung = "- `cupyx` **hung**: no answer in 60 s (1024 × 65536 bfloat16; 1024 × 65536 float32)\n"
    wrong = "- `torch.compile` **wrong**: error 3 > 1e-6 (16384 × 4096 bfloat16; "
    assert table.index(hung) < table.index(wrong)
    assert "`cupyx` 4.00× (clock: events) |" in table  # torch.compile is wrong there
    assert re.search(r"\| 64 × 201088, k 5 \| float32 \| – \| \*\*wrong\*\* \|.*`cupy` – \|", text)
    assert "`matmul` **failed**: out of \\| memory" in text


def test_on_the_paper_s_shapes_every_speed_up_is_beside_its_baseline():
    result = synthetic.full() | {"cells": synthetic.paper_cells()}
    assert schema.validate(result) is True
    table = section(report.markdown(result), "softmax_topk, paper-topk")
    assert "| over `paper: safe softmax, then top-5` | over `torch softmax, topk` |\n" in table
    assert "| 4000 × 63, k 5 | float32 | 5.00× | 2.00× |\n" in table
    assert "| 4000 × 126, k 5 | float32 | 2.50× | – |\n" in table  # torch is wrong there
    assert "| 10 × 63, k 5 | float32 | **0.500×** | 1.50× |\n" in table
    cells = [cell | {"contestants": cell["contestants"][::2]} for cell in synthetic.paper_cells()]
    other = report.markdown(result | {"cells": cells})
    assert "over each contestant" in table and "over each contestant" not in other


def test_the_report_has_what_needs_no_gpu_and_says_so(text):
    assert "Per element of x: 8 × 4096 random numbers" in section(text, "Ladder")
    assert "| `cuattn.softmax` | 2.00 | 1.00 | 2.00 | 2.25 | algorithm 3 |" in text
    assert "| online softmax | 2.00 | 1.00 | 3.00 | 2.25 | algorithm 3; overflows |" in text
    counted = "| logsumexp | sm_80 | 4 × 1000 float32 | `softmax_split<kReduce, 32, 4, 8>` "
    assert counted + "| 1.00 | 0.250 | 1.50 | 1.12 | – | 0 | 3 | 4096 | – | – |" in text
    assert "| sm_90 | 2 | 64 | 1 | `softmax_rows<512, 1>` 24 bytes | memory: 1, issue: 1 |" in text
    assert "| `softmax` | 9.00 | 8.40–9.60 |" in text
    assert "| cold | sm_90 | 1 | 500 | 500 | `softmax_rows<512, 1>` |" in text
    assert "| `import numpy` | 200 | 140–260 |" in text
    assert "no GPU" in section(text, "Counters") and "no GPU" in section(text, "Kernels")


def test_executed_instructions_stand_beside_their_call(full):
    """Beside no other: not of another architecture or shape."""
    (counted,) = full["counters"]
    keys = ("operation", "arch", "rows", "cols", "dtype", "kernels")
    row = {key: counted[key] for key in keys}
    row |= {"instructions": 24.5, "kinds": {"float": 20.0, "mufu": 4.5}}
    for other in ({}, {"arch": "sm_90"}, {"cols": 1001}):
        result = {**full, "instructions": [row | other]}
        assert schema.validate(result)
        assert ("| 1.12 | 24.5 | 0 |" in report.markdown(result)) is (not other)
    table = report_tables.instructions_table([row])
    assert "| all | float | mufu |" in table
    assert "| logsumexp | sm_80 | 4 × 1000 float32 | 24.5 | 20.0 | 4.50 |" in table


def test_without_a_gpu_the_report_says_so():
    result = synthetic.empty()
    text = report.markdown(result)
    assert "# Checkup of 2031-02-03: no GPU\n" in text
    assert "no number in this report was measured on one" in text
    assert "No cell was measured." in text and "torch (not installed)" in text
    assert "## Ceilings" not in text and "GB/s" not in text
    result["cells"] = synthetic.softmax_cells()
    assert "## softmax, quack (no GPU)\n" in report.markdown(result)


# -- README ------------------------------------------------------------------------------------

README = """# A
<!-- main job -->
```sh
x
```
<!-- benchmarks: made by a tool -->
old
<!-- end -->
between <!-- benchmarks -->
<!-- pictures -->
<!-- end -->
<!-- ladder: counted -->
<!-- end -->
last, without a line break"""


def test_readme_has_the_ladder_and_what_a_gpu_gave(full):
    sections = report.readme_sections(full, "r.json", {"A title": "a.svg"})
    assert sections.keys() == {"ladder", "benchmarks", "pictures"}
    assert sections["ladder"] == report_tables.ladder_table(full["ladder"])
    assert sections["pictures"] == "![A title](a.svg)"
    table = sections["benchmarks"]
    assert "NVIDIA Test GPU, 2031-02-03, commit 0123456, [`r.json`](r.json)" in table
    line = (
        "| 65536 × 1024 | 74.6 | 90 % | 2.00× torch.compile | 149 | 90 % | 2.00× torch.compile |\n"
    )
    assert line in table
    assert "| `attention` | 36 | 0 | 36 of 36 | 1.10× |" in table
    assert report.readme_sections(full).keys() == {"ladder", "benchmarks"}
    name = schema.file_name(full)
    assert f"[`{name}`](results/{name})" in report.readme_sections(full)["benchmarks"]
    assert report.readme_sections(synthetic.empty(), "r.json", {"A": "a.svg"}) == {}
    without = synthetic.empty() | {"cells": full["cells"], "ladder": full["ladder"]}
    assert report.readme_sections(without).keys() == {"ladder"}
    assert report.readme_sections(full | {"cells": []}).keys() == {"ladder"}
    longer = [step | {"rows": 1, "cols": 1 << 20} for step in full["ladder"]]
    more = report.readme_sections(full | {"ladder": full["ladder"] + longer})
    assert more["ladder"] == sections["ladder"]  # the first shape only


def test_readme_is_the_same_but_for_its_sections():
    sections = {"benchmarks": r"new \1 text", "pictures": "![a](b.svg)\n"}
    updated = report.update_readme(README, sections)
    expected = README.replace("\nold\n", "\n\nnew \\1 text\n\n").replace(
        "<!-- pictures -->\n", "<!-- pictures -->\n\n![a](b.svg)\n\n"
    )
    assert updated == expected
    assert report.update_readme(updated, sections) == updated
    assert report.update_readme(README, {}) == README


def test_the_real_readme_has_a_place_for_every_section(full):
    sections = report.readme_sections(full, pictures={"A title": "results/a.svg"})
    text = ladder.README.read_text(encoding="utf-8")
    assert report.update_readme(text, sections).count("](results/") == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (README, "host cost"),
        (README, "bench"),
        (README, "main job"),
        (README.replace("old\n<!-- end -->", "old"), "benchmarks"),
        (README.replace("between <!--", "<!--"), "benchmarks"),
    ],
    ids=["missing", "part of a name", "no end", "end of another", "twice"],
)
def test_a_section_without_its_place_is_an_error(text, name):
    with pytest.raises(ValueError, match=f"`<!-- {name} -->`"):
        report.update_readme(text, {name: "new"})


# -- Pictures ----------------------------------------------------------------------------------

PICTURES = {
    "softmax-quack-bandwidth": ["cupyx", "torch.compile", "copy ceiling", "GB/s", "bfloat16"],
    "softmax_topk-vocabulary-topk-speed-up": ["torch", "cupy", "0.50×", "wrong", "201088"],
    "attention-flash-attention-throughput": [
        "flash_attn", "matmul ceiling", "TFLOP/s", "not causal, head_dim 64",
    ],
    "attention-flash-attention-memory": ["flash_attn", "matmul", "64 MiB", "16 GiB"],
}  # fmt: skip


def test_pictures_and_readme_from_the_command_line(full, tmp_path):
    pytest.importorskip("matplotlib")
    schema.save(full, tmp_path / "docs" / "r.json")
    readme = tmp_path / "README.md"
    readme.write_bytes(README.encode())
    arguments = [str(tmp_path / "docs" / "r.json"), "--readme", str(readme)]
    assert plot.main(arguments) == 0
    files = {path.stem: path.read_bytes() for path in (tmp_path / "docs").glob("*.svg")}
    assert files.keys() == {f"r-{name}" for name in PICTURES}
    for name, expected in PICTURES.items():
        texts = [node.text for node in ET.fromstring(files[f"r-{name}"]).iter() if node.text]
        for word in ("cuattn", "NVIDIA Test GPU", "2031-02-03", "commit 0123456", *expected):
            assert any(word in text for text in texts), (name, word)
        assert f"](docs/r-{name}.svg)" in readme.read_text(encoding="utf-8")
    assert "[`r.json`](docs/r.json)" in readme.read_text(encoding="utf-8")
    first = readme.read_bytes()
    plot.main([*arguments, "--out", str(tmp_path / "docs")])
    assert readme.read_bytes() == first
    again = {path.stem: path.read_bytes() for path in (tmp_path / "docs").glob("*.svg")}
    assert again == files  # the same bytes


def test_no_picture_without_a_gpu_or_without_points(full, tmp_path):
    pytest.importorskip("matplotlib")
    assert plot.draw(synthetic.empty() | {"cells": full["cells"]}, tmp_path) == []
    assert plot.draw(full | {"cells": []}, tmp_path) == []
    assert plot.draw(full | {"cells": full["cells"][:3]}, tmp_path) == []
    failed = [synthetic.contestant("cuattn", status="failed")]
    cells = [cell | {"contestants": failed} for cell in full["cells"]]
    assert plot.draw(full | {"cells": cells}, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.draw(full, tmp_path)
    schema.save(full, tmp_path / "r.json")
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "r.json")])
    assert "pip install matplotlib" in capsys.readouterr().err
