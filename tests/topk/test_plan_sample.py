"""Plans of draws: how often each way reads a row, and what its launches share.

Pure Python: sizes in, launches out. What topk_rows and radix need by themselves: test_plan_topk.py.
"""

from __future__ import annotations

import pytest
from configurations import SMS, selection
from test_plan_topk import CAPABILITIES, check_launch, check_lists

from cuattn._topk.plan_sample import plan_sample
from cuattn._topk.problem import SampleProblem

ROWS, CUT, LISTS = "topk_rows", "topk_cut", 256
SIZES = [(1, 5), (3, 300), (64, 5000), (10**5, 3000), (1, 10**6), (2, 2**33)]


def plan(
    rows, cols, num, top_k=None, top_p=False, min_p=False, capability=90, sms=SMS, x="float32"
):
    problem = SampleProblem(x, selection(rows, cols), 0)
    return plan_sample(problem, num, top_k, top_p, min_p, capability, sms)


def templates(one):
    return [kernel.template for kernel, _ in one.plan.launches]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sms", [1, 16, SMS])
@pytest.mark.parametrize("x", ["bfloat16", "float32", "float64"])
def test_every_plan_covers(x, sms, capability):
    for rows, cols in SIZES:
        for num in (1, 32, 33, 256, 257):
            for filters in ((None, False, False), (20, True, True), (None, True, False)):
                found = plan(rows, cols, num, *filters, capability, sms, x)
                for one in found.passes:
                    for kernel, _ in one.plan.launches:
                        check_launch(kernel, capability)
                    if templates(one)[0] == ROWS:
                        op = one.plan.launches[0][0].arguments["Op"].template
                        problem = SampleProblem(
                            x, selection(rows, cols), one.k, by_noise=op == "SampleByNoise"
                        )
                        check_lists(problem, one.plan, [kernel for kernel, _ in one.plan.launches])
                        assert found.lists_bytes >= one.plan.workspace_bytes
                assert found.lists_bytes % 16 == 0


def ways(found):
    """Of each pass, what it is made of, how long its list is, and what it has to do with others."""
    return [
        (
            one.plan.launches[0][0].arguments["Op"].template,
            templates(one)[0],
            one.k,
            "".join(
                letter
                for letter, role in (("f", one.finishes), ("l", one.looks), ("c", one.cuts))
                if role
            ),
        )
        for one in found.passes
    ]


NOISE, SCORE = "SampleByNoise", "SampleByScore"


@pytest.mark.parametrize(
    ("num", "filters", "expected"),
    [
        (7, (None, False, False), [(NOISE, ROWS, 7, "")]),
        (7, (50, False, False), [(SCORE, ROWS, 50, "")]),
        (300, (50, True, True), [(SCORE, ROWS, 50, "")]),
        (
            7,
            (None, True, False),
            [(SCORE, ROWS, LISTS, "f"), (SCORE, CUT, 0, "lc"), (NOISE, ROWS, 7, "c")],
        ),
        (
            7,
            (None, False, True),
            [(SCORE, ROWS, LISTS, "f"), (SCORE, CUT, 0, "lc"), (NOISE, ROWS, 7, "c")],
        ),
        (7, (300, True, True), [(SCORE, CUT, 0, "c"), (NOISE, ROWS, 7, "c")]),
    ],
    ids=str,
)
def test_ways(num, filters, expected):
    found = plan(64, 5000, num, *filters)
    assert ways(found) == expected
    assert found.needs_state == (len(expected) == 2)


@pytest.mark.parametrize("filters", [(None, False, False), (300, False, False), (None, True, True)])
def test_more_draws_than_a_list_holds(filters):
    """By radix, with states from a pass of their own; of a row that one list holds, from that."""
    found = plan(3, 10**5, 300, *filters)
    assert [templates(one)[0] for one in found.passes][-1] == "topk_clear"
    assert found.needs_state
    assert [one.cuts for one in found.passes] == ([True, True] if any(filters) else [False])
    for cols in (100, 256):
        short = plan(3, cols, 300, filters[0] and 30, *filters[1:])
        assert (
            len(short.passes) == 1
            and not short.needs_state
            and templates(short.passes[0]) == [ROWS]
        )


def test_a_row_that_is_a_list_is_read_once():
    for cols, passes in ((256, 1), (257, 3)):
        assert len(plan(5, cols, 3, None, True, False).passes) == passes
