"""Regenerate the Python modules of the contract, or with `--check` compare them with what is committed.

The modules lie beside their protos and import each other as `lorry.v1`, which the link `src/lorry/v1`
makes true. They are made with the lowest supported pair of runtimes, so that every admitted one takes
them: generated code refuses a runtime that is older than its generator.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

GRPCIO_TOOLS = "1.81.1"
ROOT = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> None:
    """Write the modules of every proto of the contract below `out`; exits on a proto that does not compile."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lorry/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "pyi")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *protos]):
        raise SystemExit("protoc failed")


def modules(root: Path) -> dict[str, str]:
    """Text of the generated modules below `root`, by file name."""
    return {path.name: path.read_text() for path in root.glob("lorry/v1/*") if path.name.endswith(SUFFIXES)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    check = parser.parse_args().check
    version = importlib.metadata.version("grpcio-tools")
    if version != GRPCIO_TOOLS:
        print(f"grpcio-tools is {version}; the committed modules need {GRPCIO_TOOLS}", file=sys.stderr)
        return 1
    if not check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = modules(Path(folder)), modules(ROOT)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    for name in stale:
        print(f"protos/lorry/v1/{name} is stale: run python protos/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
