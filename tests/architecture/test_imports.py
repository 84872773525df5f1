import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.architecture.repository import (
    IMPORT_ALL,
    PARTS,
    ROOT,
    imported_modules,
    python_sources,
    run_python,
)

SOURCE_ROOTS = tuple(ROOT / part for part in PARTS)
GPU_PACKAGES = ("flash_attn", "bitsandbytes")
"""Optional: missing where there is no GPU."""
OPTIONAL = (*GPU_PACKAGES, "triton")
"""Triton comes with torch's CUDA builds; each file with a kernel imports it."""


def loaded_by(*modules: str) -> set[str]:
    """Returns the names in sys.modules once the modules and all below them are imported."""
    printed = run_python(IMPORT_ALL, ",".join(modules), ",".join(OPTIONAL), path=SOURCE_ROOTS)
    return set(json.loads(printed.splitlines()[-1]))


def test_walk_imports_every_module() -> None:
    loaded = loaded_by("tokenloom.wire", "tokenloom.scheduler")
    assert {"tokenloom.wire.codec", "tokenloom.scheduler.core.blocks"} <= loaded


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("tokenloom.v1", "tokenloom.wire msgspec zmq numpy torch"),
        ("tokenloom.wire", "tokenloom.v1 google grpc zmq numpy torch"),
        (
            "tokenloom.client",
            "tokenloom.wire tokenloom.scheduler tokenloom.worker google.rpc msgspec torch zmq",
        ),
        ("tokenloom.scheduler", "tokenloom.worker tokenloom.client torch safetensors"),
        ("tokenloom.scheduler.core.planning", "tokenloom.scheduler.front grpc zmq asyncio"),
        ("tokenloom.scheduler.core.applying", "tokenloom.scheduler.front grpc zmq asyncio"),
        ("tokenloom.worker", "tokenloom.v1 tokenloom.scheduler tokenloom.client grpc google"),
        ("tokenloom.worker.fake", "torch safetensors transformers"),
        # `--help` answers at once.
        ("tokenloom.client.cli", "torch tokenloom.scheduler tokenloom.worker"),
        ("tokenloom.scheduler.cli", "torch grpc zmq numpy tokenizers"),
        ("tokenloom.worker.cli", "torch grpc safetensors"),
        ("tokenloom.worker.plan", "torch grpc zmq numpy safetensors huggingface_hub"),
    ],
)
def test_import_leaves_out_what_the_dependency_table_forbids(importer: str, forbidden: str) -> None:
    loaded = loaded_by(importer)
    assert importer in loaded
    assert not loaded.intersection(forbidden.split())


def test_each_gpu_package_has_one_importer() -> None:
    importers: dict[str, set[Path]] = defaultdict(set)
    for path, source in python_sources():
        for module in imported_modules(source):
            package = module.partition(".")[0]
            if package in GPU_PACKAGES and path.parts[0] in PARTS:
                importers[package].add(path)
    assert {package: paths for package, paths in importers.items() if len(paths) > 1} == {}


def test_tokenloom_is_a_namespace_without_a_module_of_its_own() -> None:
    assert not [path for path, _ in python_sources() if path.match("*/tokenloom/__init__.py")]
