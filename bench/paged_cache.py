"""An example: the cache of a batch of growing sequences, in pages that go from one to another.

    python -m bench.paged_cache

Which pages a sequence has is up to the caller: here a list of free ones, and the table on the host.
Sequences come in as there is a slot for them. Their prompts are read in chunks, then all are
continued together, token by token; who has ended gives its pages back. The queries, keys and values
are random here, a model would compute them. Exit code 1 if anything is not what `cuattn.attention`
makes of each sequence alone.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

import cuattn
from bench.timing import environment

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 16
SLOTS, POOL, MOST = 3, 24, 160  # sequences at a time, pages, tokens of a sequence
CHUNK = 32  # tokens of a prompt that are read at a time
PROMPTS, LENGTHS = (70, 3, 33, 100, 17, 64), (90, 40, 47, 132, 18, 80)  # of six sequences
TOLERANCE = 1e-5


class Pages:
    """The pages of a pool, and those that each slot has: -1 where it has none."""

    def __init__(self, pages: int, page_size: int, slots: int, columns: int) -> None:
        self.page_size, self.free = page_size, list(range(pages))
        self.table = np.full((slots, columns), -1, np.int32)
        self.lens = np.zeros(slots, np.int32)

    def grow(self, slot: int, tokens: int) -> None:
        """Pages for more tokens, which the slot counts from now on."""
        have, need = (-(-int(n) // self.page_size) for n in self.lens[slot] + (0, tokens))
        for column in range(have, need):
            self.table[slot, column] = self.free.pop()
        self.lens[slot] += tokens

    def end(self, slot: int) -> None:
        """The pages of a slot are free again."""
        self.free += self.table[slot][self.table[slot] >= 0].tolist()
        self.table[slot], self.lens[slot] = -1, 0


class Sequence(NamedTuple):
    """What a model makes of its tokens, (heads, tokens, DIM), of which the first are the prompt."""

    q: Any
    k: Any
    v: Any
    prompt: int


def serve(sequences: list[Sequence], xp: Any) -> list[Any]:
    """Attention of every token to those before it, of all sequences."""
    pool = xp.zeros((POOL, 2, KV_HEADS, PAGE, DIM), sequences[0].q.dtype)
    pages, slots = Pages(POOL, PAGE, SLOTS, -(-MOST // PAGE)), [-1] * SLOTS
    outs, waiting = [xp.empty_like(one.q) for one in sequences], list(range(len(sequences)))

    def attend(rows: list[int], q: Any, k: Any, v: Any, counts: list[int]) -> Any:
        """Of the new tokens of some slots, that have as many each; their keys go into the pages."""
        lens = xp.asarray(pages.lens[rows])
        for slot, count in zip(rows, counts, strict=True):
            pages.grow(slot, count)
        how = {"kv_lens": lens, "page_table": xp.asarray(pages.table[rows]), "is_causal": True}
        how |= {"k_new": k, "v_new": v, "q_lens": xp.asarray(np.array(counts, np.int32))}
        return cuattn.attention_kvcache(q, pool[:, 0], pool[:, 1], **how)

    while waiting or max(slots) >= 0:
        for slot in range(SLOTS):
            if slots[slot] < 0 and waiting:
                n = slots[slot] = waiting.pop(0)
                for start in range(0, sequences[n].prompt, CHUNK):
                    part = slice(start, min(start + CHUNK, sequences[n].prompt))
                    new = [array[None, :, part] for array in sequences[n][:3]]
                    outs[n][:, part] = attend([slot], *new, [part.stop - part.start])[0]
        active = [n >= 0 and int(pages.lens[slot]) < sequences[n].q.shape[1]
                  for slot, n in enumerate(slots)]  # fmt: skip
        at = [int(length) for length in pages.lens]
        new = [  # of a slot without a sequence any tokens, which do not count
            xp.stack([sequences[n][i][:, t : t + 1] if on else sequences[0][i][:, :1]
                      for n, t, on in zip(slots, at, active, strict=True)])
            for i in range(3)
        ]  # fmt: skip
        out = attend(list(range(SLOTS)), *new, [int(on) for on in active])
        for slot, n in enumerate(slots):
            if active[slot]:
                outs[n][:, at[slot]] = out[slot, :, 0]
            if n >= 0 and int(pages.lens[slot]) == sequences[n].q.shape[1]:
                pages.end(slot)
                slots[slot] = -1
    assert sorted(pages.free) == list(range(POOL))
    return outs


def draw(rng: np.random.Generator, xp: Any) -> list[Sequence]:
    """Six sequences of normal deviates."""
    heads = HEADS, KV_HEADS, KV_HEADS
    return [
        Sequence(*(xp.asarray(rng.standard_normal((h, n, DIM), np.float32)) for h in heads), prompt)
        for prompt, n in zip(PROMPTS, LENGTHS, strict=True)
    ]


def error(sequences: list[Sequence], outs: list[Any]) -> float:
    """How far results are from `cuattn.attention`."""
    return max(
        float(abs(cuattn.attention(*one[:3], is_causal=True) - out).max())
        for one, out in zip(sequences, outs, strict=True)
    )


def main() -> int:
    xp: Any = np
    if environment.gpu():
        import cupy as xp
    sequences = draw(np.random.default_rng(0), xp)
    found, needed = error(sequences, serve(sequences, xp)), sum(-(-n // PAGE) for n in LENGTHS)
    print(f"{len(sequences)} sequences of {needed} pages in a pool of {POOL}: error {found:.1e}")
    return 0 if found <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
