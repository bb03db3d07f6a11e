"""The k most probable elements of each row against every peer that is installed; needs a GPU.

    python -m pytest bench/bench_softmax_topk.py --benchmark-only -k "paper-topk"

Among the peers are a whole softmax and a selection from it (CuPy's argpartition, `torch.topk`) and,
on the shapes of arXiv:1805.02867, section 5, the paper's own kernels: "paper: safe softmax, then
top-5" is what its speed-ups are over, five accesses per element. Data and checks: bench_top_k.py.
"""

from __future__ import annotations

from bench.bench_top_k import operation


def bench_softmax_topk(benchmark, measured):
    measured.replay(benchmark)


OPERATIONS = {"softmax_topk": operation("softmax_topk")}
