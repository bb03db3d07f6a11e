"""``python tests/software_device -m MODULE ...`` or ``... SCRIPT ...``: runs it on the device."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main():
    arguments = sys.argv[1:]
    if not arguments or (arguments[0] == "-m" and len(arguments) < 2):
        sys.exit("usage: python tests/software_device (-m MODULE | SCRIPT) [ARGUMENT ...]")
    folders = [str(path) for path in HERE.parents[:2]]  # tests/ and the checkout
    sys.path[:1] = folders  # in place of this folder
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([given] if given else [])])
    import software_device

    try:
        software_device.install()
    except software_device.Unavailable as error:
        sys.exit(f"no software device: {error}")
    if arguments[0] == "-m":
        if arguments[1] == "pytest":  # and its workers
            os.environ["PYTEST_PLUGINS"] = "software_device.plugin"
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
