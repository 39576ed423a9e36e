# SPDX-License-Identifier: Apache-2.0
"""Runs a program with compat installed, otherwise as python itself runs it.

python -m mambablock.compat script.py args...
python -m mambablock.compat -m module args...
python -m mambablock.compat -c command args...
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import zipfile
from types import ModuleType, TracebackType

from mambablock.compat import install

usage = "usage: python -m mambablock.compat [-m module | -c command | script] [argument ...]"


def main() -> None:
    del sys.argv[0]
    option, *rest = sys.argv or [""]
    if option in ("", "-h", "--help"):
        print(usage, file=sys.stdout if option else sys.stderr)
        sys.exit(0 if option else 2)
    if option in ("-m", "-c") and not rest:
        sys.exit(_failed(f"Argument expected for the {option} option\n{usage}", 2))
    install()
    try:
        if option == "-m":
            _run_module(sys.argv.pop(1))
        elif option == "-c":
            _run_source(sys.argv.pop(1), "<string>")
        else:
            _run_script(option)
    except SystemExit:
        raise
    except BaseException as error:
        error = error.with_traceback(_of_the_program(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _run_module(name: str) -> None:
    parent = name.rpartition(".")[0]
    if not parent and importlib.util.find_spec(name) is None:
        sys.exit(_failed(f"{sys.executable}: No module named {name}", 1))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_script(path: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        runpy.run_path(path, run_name="__main__")
        return
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        text = f"can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] {error.strerror}"
        sys.exit(_failed(f"{sys.executable}: {text}", 2))
    _run_source(source, path)


def _run_source(source: str | bytes, path: str) -> None:
    """As the module __main__, where pickle and multiprocessing look for what it defines."""
    module = ModuleType("__main__")
    if path != "<string>":
        module.__file__ = path = os.path.abspath(path)
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec"), module.__dict__)


def _of_the_program(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the calls that lead to the program."""
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace


def _failed(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
