"""Beam search without the probabilities of a whole vocabulary: `softmax_topk` for each beam, then
`top_k` over the candidates of all beams. A small random network stands for a language model.

    pip install cuattn
    python bench/examples/beam_search.py
"""

from __future__ import annotations

import itertools

import cuattn

try:
    import cupy as xp

    xp.cuda.Device().use()
except Exception:  # no CuPy, or no GPU
    import numpy as xp

TOKENS, HIDDEN, STEPS = 8, 16, 4
rng = xp.random.default_rng(0)
embedding = 2 * rng.standard_normal((TOKENS, HIDDEN))
recurrent = rng.standard_normal((HIDDEN, HIDDEN))


def model(hidden, tokens):
    """A step of every beam: its hidden state, and the logits of the tokens that may follow."""
    hidden = xp.tanh(hidden @ recurrent + embedding[tokens])
    return hidden, hidden @ embedding.T


def beam_search(start, beams):
    """The `beams` most probable continuations of a token, best first, with log-probabilities."""
    scores, sequences, hidden = xp.zeros(1), xp.full((1, 1), start), xp.zeros((1, HIDDEN))
    for _ in range(STEPS):
        hidden, logits = model(hidden, sequences[:, -1])
        k = min(beams, TOKENS)  # of one beam no more than that are among the best of all
        tokens = cuattn.softmax_topk(logits, k, output="log_prob")
        candidates = (scores[:, None] + tokens.values).ravel()
        scores, best = cuattn.top_k(candidates, min(beams, candidates.size))
        hidden, sequences = hidden[best // k], sequences[best // k]  # those of their beams
        sequences = xp.hstack([sequences, tokens.indices.reshape(-1, 1)[best]])
    return scores, sequences


# Every continuation of token 0, and its log-probability by definition.
every = xp.asarray([[0, *rest] for rest in itertools.product(range(TOKENS), repeat=STEPS)])
expected, hidden = xp.zeros(len(every)), xp.zeros((len(every), HIDDEN))
for token, following in itertools.pairwise(every.T):
    hidden, logits = model(hidden, token)
    expected += logits[xp.arange(len(every)), following] - xp.log(xp.exp(logits).sum(axis=1))

scores, sequences = beam_search(0, beams=TOKENS ** (STEPS - 1))  # wide enough to lose nothing
order = xp.argsort(-expected)[: len(scores)]
assert xp.allclose(scores, expected[order]) and (sequences == every[order]).all()
scores, sequences = beam_search(0, beams=3)
assert xp.allclose(scores, expected[sequences @ TOKENS ** xp.arange(STEPS, -1, -1)])
print(*sequences.tolist(), sep="\n")
