"""What ``python -m cuattn`` says of the kept tokens in words: predicted, drawn, linked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import cuattn
from cuattn import reference
from cuattn.data.cases import BEST, SEED, Device, compare, own_words


def words_of(sample: dict[str, np.ndarray]) -> np.ndarray:
    """The vocabulary, as far as it is known: the stored words."""
    words = np.full(sample["logits"].shape[-1], "?", dtype=object)
    words[sample["top5_indices"]] = sample["top5_words"]
    return words


def kept(sample: dict[str, np.ndarray]) -> list[str]:
    """The kept tokens."""
    tokens: list[str] = sample["tokens"][sample["logit_rows"]].tolist()
    return tokens


def predict(sample: dict[str, np.ndarray], device: Device) -> tuple[list[Any], dict[str, Any]]:
    """The five most probable words of each kept token beside the stored ones."""
    logits = device.to_device(sample["logits"].astype(np.float32))  # as float16 many would tie
    found = cuattn.softmax_topk(logits, BEST)
    got, best = device.to_host(found.values), device.to_host(found.indices)
    tables = words_of(sample)[best], got, sample["top5_words"], sample["top5_probs"]
    top5 = []
    for token, *row in zip(kept(sample), *tables, strict=True):
        names, probs, *known = (part.tolist() for part in row)
        pairs = {"predicted": list(zip(names, probs)), "stored": list(zip(*known))}  # noqa: B905
        top5.append({"token": token, **pairs})
    check = compare(got, sample["top5_probs"])
    same = np.array_equal(best, sample["top5_indices"])
    return top5, check | {"ok": check["ok"] and same}


def perplexity(sample: dict[str, np.ndarray], device: Device) -> dict[str, Any]:
    """Among how many equally probable words the kept tokens are, by the mean of their losses."""
    logits, labels = sample["logits"].astype(np.float32), own_words(sample)
    loss = cuattn.cross_entropy(device.to_device(logits), device.to_device(labels))
    got = np.exp(np.mean(device.to_host(loss)))
    expected = np.exp(np.mean(reference.cross_entropy(logits, labels)))
    return {"value": float(got), **compare(got, expected, roundings=16)}


def draw(sample: dict[str, np.ndarray], device: Device) -> dict[str, Any]:
    """Five draws for each kept token from its five most probable words, one an offset."""
    logits = sample["logits"].astype(np.float32)
    x = device.to_device(logits)

    def drawn_by(function: Callable[..., Any], x: Any) -> np.ndarray:
        draws = (function(x, seed=SEED, offset=i, top_k=BEST) for i in range(BEST))
        return np.hstack([device.to_host(draw) for draw in draws])

    got, expected = drawn_by(cuattn.sample, x), drawn_by(reference.sample, logits)
    drawn = zip(kept(sample), words_of(sample)[got].tolist(), strict=True)
    rows = [{"token": token, "words": words} for token, words in drawn]
    return {"seed": SEED, "rows": rows, "ok": np.array_equal(got, expected)}


def link(sample: dict[str, np.ndarray], device: Device) -> dict[str, Any]:
    """Which other words each kept token attends to: the first of each head, the five strongest."""
    q, k, own = sample["q"][:, sample["logit_rows"]], sample["k"], sample["tokens"]
    mask = np.char.isalpha(own) & (own != np.array(kept(sample))[:, None])
    x, keys, seen = map(device.to_device, (q, k, mask))
    found = cuattn.attention_topk(x, keys, 1, mask=seen)
    best, probs = (device.to_host(part)[..., 0].T for part in (found.indices, found.values))
    expected = reference.attention_topk(q, k, 1, mask=mask)
    rows = []
    for token, places, shares in zip(kept(sample), best, probs, strict=True):
        heads = np.argsort(-shares)[:BEST].tolist()
        links = [(str(own[places[h]]), float(shares[h]), h) for h in heads]
        rows.append({"token": token, "links": links})
    check = compare(device.to_host(found.values), expected.values, roundings=16)
    same = np.array_equal(best.T, expected.indices[..., 0])
    return {"rows": rows, **check, "ok": check["ok"] and same}
