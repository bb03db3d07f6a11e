"""pytest's side of the software device: ``python -m pytest -p software_device.plugin -m gpu``.

``PYTHONPATH`` must hold tests/, since the plugin comes before pytest's own path and before every
``import cupy``. Where the device cannot be had, the ``gpu`` tests are skipped with the reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from pathlib import Path

import pytest

for _folder in Path(__file__).resolve().parents[1:3]:  # tests/ and the checkout
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads spin while they wait
import software_device  # noqa: E402

reason = None  # why there is none
arch = f"sm_{os.environ.get('SOFTWARE_DEVICE_CC', '80')}"
try:
    software_device.install()
except software_device.Unavailable as error:
    reason = str(error)


def pytest_report_header(config):
    if reason is not None:
        return f"software device: none, {reason}"
    return f"software device: {arch}"


def pytest_collection_modifyitems(config, items):
    if reason is None:
        return
    if os.environ.get("CUATTN_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"CUATTN_REQUIRE_GPU=1, but there is no software device: {reason}")
    skip = pytest.mark.skip(reason=f"no software device: {reason}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_setup(item):
    """The order of queued work depends on the run's seed and the test, not on other tests."""
    if software_device.device is not None:
        run = os.environ.get("SOFTWARE_DEVICE_SEED") or os.environ.get("CUATTN_TEST_SEED") or "0"
        software_device.device.seed(zlib.crc32(f"{run} {item.nodeid}".encode()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test has queued runs in that test, and its errors are the test's."""
    device = software_device.device
    try:
        result = yield
    except BaseException:
        if device is not None:
            with contextlib.suppress(RuntimeError):
                device.flush()
            device.reset()  # a capture may go on
        raise
    if device is not None:
        device.flush()
    return result
