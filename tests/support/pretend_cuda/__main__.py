"""`python -m support.pretend_cuda SCRIPT ...` or `... -m MODULE ...`: run a program beside a pretended CUDA device."""

import runpy
import sys

from support.pretend_cuda import install

install()
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    from pathlib import Path

    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
