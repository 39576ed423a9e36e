# SPDX-License-Identifier: Apache-2.0
"""Runs a program with compat installed, as python itself would run it.

python -m mambablock.compat script.py args...
python -m mambablock.compat -m module args...
python -m mambablock.compat -c command args...
"""

from __future__ import annotations

import os
import runpy
import sys

from mambablock.compat import install

usage = "usage: python -m mambablock.compat [-m module | -c command | script] [argument ...]"


def main() -> None:
    del sys.argv[0]
    if not sys.argv or sys.argv[0] in ("-h", "--help"):
        print(usage, file=sys.stderr if not sys.argv else sys.stdout)
        sys.exit(2 if not sys.argv else 0)
    install()
    option = sys.argv[0]
    if option in ("-m", "-c"):
        if len(sys.argv) < 2:
            print(f"Argument expected for the {option} option\n{usage}", file=sys.stderr)
            sys.exit(2)
        name = sys.argv.pop(1)
        if option == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = ""
            exec(compile(name, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(option))
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    main()
