"""What this device can do at best, measured in the same run: copy, read, matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BYTES = 1 << 31  # far more than any L2
EDGE = 8192  # of the matrices
ROUNDS = 20


def measure(device: Any) -> dict[str, Any]:
    """The `ceilings` of a result: of each kind the fastest way that works here."""
    with device.current():
        copy = _best(device, _copies(device), "B/s", 2 * BYTES, f"2 * {BYTES} B: read + write")
        read = _best(device, _reads(device), "B/s", BYTES, f"{BYTES} B: a reduction")
        flops, formula = 2 * EDGE**3, f"2 * {EDGE}^3 FLOP"
        matmul = _best(device, _products(device), "FLOP/s", flops, formula)
    found = {"copy": copy, "read": read, "matmul": matmul}
    return {name: ceiling for name, ceiling in found.items() if ceiling is not None}


Ways = list[tuple[str, Callable[[], Any]]]


def _copies(device: Any) -> Ways:
    x = _normal(device, BYTES // 4)
    y = device.xp.empty_like(x)
    return [
        ("cudaMemcpyAsync", lambda: y.data.copy_from_device_async(x.data, BYTES)),
        ("an elementwise kernel", lambda: device.xp.copyto(y, x)),
    ]


def _reads(device: Any) -> Ways:
    x = _normal(device, BYTES // 4)
    return [("maximum", x.max), ("sum", x.sum)]


def _normal(device: Any, *shape: int) -> Any:
    """Random float32 data: zeros run faster than data does."""
    return device.xp.random.default_rng().standard_normal(shape, dtype=device.xp.float32)


def _best(device: Any, ways: Ways, unit: str, work: int, formula: str) -> dict[str, Any] | None:
    """The fastest of several ways; None if none works."""
    best: dict[str, Any] | None = None
    for name, run in ways:
        try:
            samples = _samples(device, run)
        except Exception:  # this CuPy cannot do it this way
            continue
        if best is None or sorted(samples)[ROUNDS // 2] < sorted(best["samples"])[ROUNDS // 2]:
            best = {
                "unit": unit,
                "formula": f"{formula}, by {name}",
                "work": work,
                "samples": samples,
            }
    return best


def _samples(device: Any, run: Callable[[], Any]) -> list[float]:
    run()
    device.synchronize()
    samples = []
    for _ in range(ROUNDS):
        device.delay(100e-6)
        start = device.mark()
        run()
        samples.append(device.seconds(start, device.mark()))
    return samples


def _products(device: Any) -> Ways:
    """torch's bfloat16 product, and CuPy's of float16, whose rate on tensor cores is the same."""
    xp = device.xp
    half = _normal(device, EDGE, EDGE).astype(xp.float16)
    ways = [("CuPy's float16 product", lambda: xp.matmul(half, half))]
    try:
        import torch

        stream = torch.cuda.ExternalStream(device.stream.ptr)
        matrix = torch.randn(EDGE, EDGE, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
    except Exception:  # no torch, or one without CUDA
        return ways

    def product() -> None:
        with torch.cuda.stream(stream):
            torch.matmul(matrix, matrix)

    return [*ways, ("torch's bfloat16 product", product)]
