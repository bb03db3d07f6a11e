"""Which kernels draw from rows, and how often each reads them.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from cuattn._arrays.row_layout import OPERANDS
from cuattn._device.kernel import Kernel
from cuattn._softmax.plan_parts import geometry
from cuattn._topk.plan import MAX_LIST, TopKPlan, plan_lists
from cuattn._topk.plan_radix import plan_radix
from cuattn._topk.problem import SampleProblem

CANDIDATE = 16  # bytes of a row's cut
CUT_THREADS = 512  # a block has a row
CUT_ITEMS = 8  # elements per thread in registers, and as many in flight


@dataclass(frozen=True)
class Pass:
    """Launches that have parameters in common: those of their selection and of their kernels."""

    plan: TopKPlan
    k: int
    finishes: bool = False  # writes which rows are finished, and states
    looks: bool = False  # reads which rows are finished
    cuts: bool = False  # reads cuts, or writes them

    @property
    def lists(self) -> bool:
        """Whether it reads rows to keep a list, and adds them up."""
        return self.k > 0 and not self.plan.radix


@dataclass(frozen=True)
class SamplePlan:
    """Passes of one call, in order.

    `needs_state`: the state of every row is an input. `lists_bytes`: what passes use of the
    workspace by themselves, one after the other.
    """

    passes: tuple[Pass, ...]
    needs_state: bool = False

    @property
    def lists_bytes(self) -> int:
        return -(-max(one.plan.workspace_bytes for one in self.passes) // 16) * 16


@lru_cache(maxsize=4096)
def plan_sample(
    problem: SampleProblem,
    num: int,
    top_k: int | None,
    top_p: bool,
    min_p: bool,
    compute_capability: int,
    num_sms: int,
) -> SamplePlan:
    """Kernels of `num` draws, num >= 1, from rows of at least one column; `k` of the problem is not
    looked at.

    A list tells at once what is kept, or that too much of the row is beyond it: then a cut is
    searched for, and the row is drawn from again.
    """
    cols = problem.layout.cols
    limits = compute_capability, num_sms

    def listed(k: int, by_noise: bool, **roles: bool) -> Pass:
        one = replace(problem, k=min(k, cols), by_noise=by_noise)
        return Pass(plan_lists(one, *limits), one.k, **roles)

    if top_k is not None and top_k <= MAX_LIST:
        return SamplePlan((listed(top_k, False),))
    if min(num, cols) > MAX_LIST:
        radix = plan_radix(replace(problem, k=num), num_sms)
        launches = tuple((launch.kernel, launch.geometry) for launch in radix.launches)
        plan = TopKPlan(launches, radix.workspace_bytes, geometry(problem.layout), radix=True)
        last = Pass(plan, num)
    else:
        last = listed(num, True)
    if top_k is None and not top_p and not min_p:
        return SamplePlan((last,), needs_state=last.plan.radix)
    cut = Pass(_plan_cut(problem), 0, cuts=True)
    last = replace(last, cuts=True)
    if top_k is not None or last.plan.radix:
        return SamplePlan((cut, last), needs_state=True)
    first = listed(MAX_LIST, False)
    if first.k == cols:
        return SamplePlan((first,))
    return SamplePlan((replace(first, finishes=True), replace(cut, looks=True), last))


def _plan_cut(problem: SampleProblem) -> TopKPlan:
    """topk_cut, of all rows."""
    vec = problem.vec if problem.layout.col_stride[OPERANDS.index("x")] == (1,) else 1
    arguments = {
        "Op": replace(problem, by_noise=False).op,
        "kThreads": CUT_THREADS,
        "kVec": vec,
        "kFragments": max(1, CUT_ITEMS // vec),
    }
    kernel = Kernel("topk_cut", arguments, problem.layout.rows, CUT_THREADS)
    return TopKPlan(((kernel, b""),), 0, geometry(problem.layout))
