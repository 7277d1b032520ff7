"""Regenerate the committed protobuf code from the .proto files in this folder.

    python -m protos.generate            rewrite the generated files
    python -m protos.generate --check    exit 1 if the committed files differ from what would be generated

Run from the repository root: the imports in the .proto files and in the generated code both start at `protos/`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent


def generate(destination: pathlib.Path) -> dict[str, str]:
    """Run protoc into `destination`; return file name -> content."""
    from grpc_tools import protoc

    sources = sorted(f"protos/{path.name}" for path in HERE.glob("*.proto"))
    options = [f"--{kind}_out={destination}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{HERE.parent}", *options, *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    made = {path.name: path.read_text() for path in (destination / "protos").iterdir()}
    return {name: text for name, text in made.items() if not name.endswith("_grpc.py") or "Servicer" in text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only, change nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = generate(pathlib.Path(folder))
    committed = {path.name: path.read_text() for path in HERE.glob("*_pb2*.py*")}
    if arguments.check:
        stale = sorted(name for name in made.keys() | committed.keys() if made.get(name) != committed.get(name))
        if stale:
            print(f"stale generated files, run `python -m protos.generate`: {', '.join(stale)}", file=sys.stderr)
        return 1 if stale else 0
    for name in committed.keys() - made.keys():
        (HERE / name).unlink()
    for name, text in made.items():
        (HERE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
