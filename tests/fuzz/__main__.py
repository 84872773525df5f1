"""Runs a fuzz target: `python -m tests.fuzz NAME [LIBFUZZER_OPTION …]`.

`-max_total_time=600` runs for ten minutes, `-runs=10000` for so many executions; a path runs what
lies there. What breaks a target is written to build/fuzz/. Source: https://llvm.org/docs/LibFuzzer
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import atheris

from tests.fuzz.target import Target

NAMES = ("validation", "wire", "stops")
FINDINGS = Path("build/fuzz")


def main(argv: list[str]) -> None:
    """Ends the process: with 0 if nothing was found."""
    if not argv or argv[0] not in NAMES:
        sys.exit(f"python -m tests.fuzz {'|'.join(NAMES)} [LIBFUZZER_OPTION …]")
    name, *options = argv
    with atheris.instrument_imports(include=["tokenloom"]):
        target: Target = importlib.import_module(f"tests.fuzz.{name}").TARGET
    FINDINGS.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp(prefix="tokenloom-fuzz-"))
    for place, seed in enumerate(target.seeds):
        (corpus / f"seed-{place}").write_bytes(seed)
    fixed = (f"-artifact_prefix={FINDINGS}/{name}-", f"-max_len={target.max_bytes}")
    atheris.Setup([name, *fixed, *options, str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
