"""Writes the stubs of Espalier's schema beside this file, from `proto/` of the repository or of --proto."""

import argparse
import importlib.resources
import pathlib
import sys

from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent


def generate(schema: pathlib.Path, out: pathlib.Path) -> None:
    """Messages, their types and the services, as packages below `out`.

    Raises SystemExit when the schema cannot be compiled.
    """
    files = sorted(str(path.relative_to(schema)) for path in schema.glob("espalier/v1/*.proto"))
    if not files:
        raise SystemExit(f"there is no schema below {schema}")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    flags = [f"--proto_path={schema}", f"--proto_path={well_known}"]
    flags += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *flags, *files]) != 0:
        raise SystemExit("the schema was not compiled")
    for package in (out / "espalier", out / "espalier" / "v1"):
        (package / "__init__.py").touch()
    (out / "espalier" / "py.typed").touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proto", type=pathlib.Path, default=HERE.parents[2] / "proto", help="folder with espalier/v1")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="where the package `espalier` goes")
    arguments = parser.parse_args()
    generate(arguments.proto.resolve(), arguments.out)
    sys.exit(0)
