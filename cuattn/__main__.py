"""``python -m cuattn``: every public operation on real data, checked against float64 and timed.

The sample is an English paragraph in the last layer of a small transformer (`data/README.md`).
Exit code 1 if a result is further from float64 than its bound. ``compile`` fills the cache instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np

import cuattn
from cuattn._device import compile_command
from cuattn.data.cases import Case, Device, all_cases, comparable, compare
from cuattn.data.words import draw, link, perplexity, predict

MARK = {True: "ok", False: "WRONG"}


def find_device() -> Device:
    """The current GPU if CuPy sees one, else NumPy."""
    try:
        import cupy
    except ImportError:
        return Device("numpy", "CuPy is not installed: running the NumPy path.", np, int)
    if not cupy.cuda.is_available():
        return Device("numpy", "There is no CUDA device: running the NumPy path.", np, int)
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    return Device(name, f"Running on {name}.", cupy, cupy.cuda.runtime.deviceSynchronize)


def run_case(case: Case, device: Device, repeat: int) -> dict[str, Any]:
    """Check, then time: the first call compiles and is not counted."""
    got, indices = map(device.to_host, comparable(case.call(), device.xp))
    expected, expected_indices = comparable(case.expected, np)
    checked, wait = compare(got, expected, case.roundings), device.synchronize
    same = np.array_equal(indices, expected_indices)
    seconds = timeit.repeat(lambda: (case.call(), wait()), wait, number=1, repeat=repeat)
    return {
        "operation": case.operation,
        "shape": list(case.data.shape),
        "dtype": case.data.dtype.name,
        "device": device.name,
        **(checked | {"ok": checked["ok"] and same}),
        "microseconds": 1e6 * statistics.median(seconds),
    }


def slope(sample: dict[str, np.ndarray], device: Device) -> dict[str, Any]:
    """What attention_backward says of a step of q, beside central differences of attention."""
    q, k, v = (device.xp.asarray(sample[name].astype(np.float64)) for name in ("q", "k", "v"))
    rng, h = np.random.default_rng(0), 1e-5
    step, grad = (device.xp.asarray(rng.standard_normal(a.shape)) for a in (q, v))
    y, lse = cuattn.attention(q, k, v, return_lse=True)
    got = (cuattn.attention_backward(grad, q, k, v, y, lse).dq * step).sum()
    up, down = ((cuattn.attention(q + by * step, k, v) * grad).sum() for by in (h, -h))
    return compare(np.array(float(got)), np.array(float(up - down) / (2 * h)), roundings=2**30)


def report(device: Device, repeat: int) -> dict[str, Any]:
    """All results as one object, the one that ``--json`` prints."""
    with np.load(Path(__file__).parent / "data" / "minilm.npz") as arrays:
        sample = dict(arrays)
    q, k = sample["q"].astype(np.float64), sample["k"].astype(np.float64)
    scores = (q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])).astype(np.float32)
    operations = [run_case(c, device, repeat) for c in all_cases(sample, scores, device)]
    top5, probs = predict(sample, device)
    lse = cuattn.logsumexp(device.xp.asarray(scores), -1)
    out = cuattn.attention(*(device.xp.asarray(sample[name]) for name in ("q", "k", "v")))
    stored = {"top5_probs": probs, "lse": compare(device.to_host(lse), sample["lse"])}
    stored["attention"] = compare(device.to_host(out), sample["out"])
    others = {
        "gradient": slope(sample, device),
        "perplexity": perplexity(sample, device),
        "draws": draw(sample, device),
        "links": link(sample, device),
    }
    ok = all(check["ok"] for check in [*operations, *stored.values(), *others.values()])
    about = {"version": cuattn.__version__, "note": device.note, "ok": ok, **others}
    return {**about, "operations": operations, "top5": top5, "stored": stored}


def show(result: dict[str, Any]) -> None:
    """The same for people: a table, then the words."""
    line = "{:<25} {:<14} {:<9} {:<24} {:>8} {:>8} {:>9}  {}"
    print(f"cuattn {result['version']}. {result['note']}\n")
    print(line.format(*"operation shape dtype device error bound µs".split(), ""))
    for row in result["operations"]:
        call = row["operation"], "x".join(map(str, row["shape"])), row["dtype"], row["device"]
        errors = f"{row['max_error']:.1e}", f"{row['bound']:.1e}"
        print(line.format(*call, *errors, f"{row['microseconds']:.1f}", MARK[row["ok"]]))
    print("\nThe five most probable words for each kept token: predicted, and stored in float64")
    for row in result["top5"]:
        for token, what in ((row["token"], "predicted"), ("", "stored")):
            words = (f"{word} {100 * p:.2f} %" for word, p in row[what])
            print(f"{token:<11} {what:<9}", *words, sep="  ")
    drawn, mark = result["draws"], MARK[result["draws"]["ok"]]
    print(f"\nFive draws from these five words, seed {drawn['seed']}, offsets 0 to 4  {mark}")
    for row in drawn["rows"]:
        print(f"{row['token']:<11}", *row["words"], sep="  ")
    linked, mark = result["links"], MARK[result["links"]["ok"]]
    print(f"\nThe strongest links of these words to others, of a head each  {mark}")
    for row in linked["rows"]:
        links = (f"{word} {100 * p:.0f} %" for word, p, _ in row["links"])
        print(f"{row['token']:<11}", *links, sep="  ")
    print(f"\nPerplexity of the kept tokens: {result['perplexity']['value']:.2f}")
    checks = {f"the stored {what}": check for what, check in result["stored"].items()}
    checks["the perplexity in float64"] = result["perplexity"]
    checks["central differences of attention"] = result["gradient"]
    for what, check in checks.items():
        error, bound = f"{check['max_error']:.1e}", f"{check['bound']:.1e}"
        print(f"against {what}: error {error}, bound {bound}  {MARK[check['ok']]}")


def main(arguments: list[str] | None = None) -> int:
    if (given := sys.argv[1:] if arguments is None else arguments)[:1] == ["compile"]:
        return compile_command.main(given[1:])
    parser = argparse.ArgumentParser(prog="python -m cuattn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--repeat", type=int, default=20, metavar="N", help="timed calls of each")
    parser.add_argument("--info", action="store_true", help="print cuattn.show_config() instead")
    parser.add_argument("--version", action="version", version=f"cuattn {cuattn.__version__}")
    options = parser.parse_args(given)
    if options.info:
        print(json.dumps(cuattn.show_config("dicts"))) if options.json else cuattn.show_config()
        return 0
    result = report(find_device(), max(1, options.repeat))
    print(json.dumps(result)) if options.json else show(result)
    return 0 if result["ok"] else 1


def main_in_a_pipe() -> int:
    """`main`, ending as other tools do where nobody reads its output any more: ``... | head``."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell says of a program that SIGPIPE has ended


if __name__ == "__main__":
    sys.exit(main_in_a_pipe())
