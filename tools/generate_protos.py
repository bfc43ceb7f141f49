"""Generates the Python code under gen/ from protos/ and third_party/.

Run by `make protos`. CI runs it into an empty folder and compares (`make check-protos`).
"""

import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("protos", "third_party")


def generate(out: Path) -> None:
    """Writes messages, services and type stubs for every proto into `out`, which is made anew."""
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        # A folder of its own, for others to read: a temporary one is its user's alone, and its copy would be.
        new = Path(scratch) / "gen"
        new.mkdir()
        files = [str(path) for source in SOURCES for path in sorted((ROOT / source).rglob("*.proto"))]
        services = [path for path in files if path.endswith("_service.proto")]
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        includes = [f"-I{ROOT / source}" for source in SOURCES] + [f"-I{well_known}"]
        plugins = Path(sys.executable).parent
        messages = [
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--python_out={new}",
            f"--mypy_out=readable_stubs,quiet:{new}",
        ]
        stubs = [
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--grpc_python_out={new}",
            f"--mypy_grpc_out=quiet:{new}",
        ]
        for arguments in ([*messages, *files], [*stubs, *services]):
            if protoc.main(["protoc", *includes, *arguments]) != 0:
                raise SystemExit("protoc failed; its message is above")
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(new, out)


def main() -> None:
    """Generates into gen/, or into the folder that is the first argument."""
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "gen")


if __name__ == "__main__":
    main()
