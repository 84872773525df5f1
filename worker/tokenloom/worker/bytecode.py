"""Python's bytecode, kept in a folder of our own where the installation has none.

Some installers and images leave it out, and imports cannot write it to a folder of another
user or with PYTHONDONTWRITEBYTECODE. Torch and flash-attn-4 import 2,400 modules, which takes
three times as long if each is compiled again.

    first start    imports:  numpy ─ torch ─ … ─ cutlass ─ …     find most of it done
                   children: torch │ torch │ sympy │ cutlass     on the other CPUs
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "sympy",
    "mpmath",
    "cutlass",
    "quack",
    "tvm_ffi",
    "flash_attn",
    "cuda",
)
"""With nearly all modules that a worker imports, in about the order in which it does"""
_MIN_CPUS = 8
"""With fewer, imports would wait for a CPU longer than for their bytecode."""


def keep_bytecode(folder: Path) -> None:
    """Has Python keep the bytecode of what is imported from now on, if torch comes without."""
    if sys.pycache_prefix is not None:
        return
    torch = find_spec("torch")
    if torch is None or torch.cached is None or Path(torch.cached).exists():
        return
    sys.pycache_prefix = str(folder)
    sys.dont_write_bytecode = False  # it says to leave the installation as it is, which holds
    num_cpus = len(os.sched_getaffinity(0))
    if not folder.exists() and num_cpus >= _MIN_CPUS:
        Thread(target=compile_packages, args=(folder, num_cpus - 2), daemon=True).start()


def compile_packages(folder: Path, num_processes: int) -> None:
    """Compiles all modules of the packages that are there, in children."""
    specs = [find_spec(name) for name in _PACKAGES]
    places = [spec.submodule_search_locations for spec in specs if spec is not None]
    folders = [each for place in places if place is not None for each in place]
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "-j", str(num_processes), *folders],
        env=os.environ | {"PYTHONPYCACHEPREFIX": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,  # what cannot be compiled is no loss
    )
