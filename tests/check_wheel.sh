#!/bin/sh
# The wheel, not the checkout: built, unpacked by pip into a folder of its own, imported from another folder.
# Its dependencies come from the environment of $PYTHON, after its own folder on the path and without the editable install
# there: fetching them again would take minutes and show nothing about the wheel.
set -eu
python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --quiet --wheel --no-isolation --outdir "$work/dist" .
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$purelib" > "$("$work/venv/bin/python" -c "$purelib")/dependencies.pth"
cd "$work"
env -u PYTHONPATH "$work/venv/bin/python" - "$work/venv" <<'PY'
import importlib.metadata
import pathlib
import sys

import trainloop

path = pathlib.Path(trainloop.__file__).resolve()
assert path.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"imported {path}, which is not the wheel"
assert (path.parent / "py.typed").is_file(), "py.typed is missing from the wheel"
assert trainloop.__version__ == importlib.metadata.version("trainloop-accelerate"), trainloop.__version__
for name in trainloop.__all__:
    getattr(trainloop, name)
files = importlib.metadata.files("trainloop-accelerate")
script = pathlib.Path(sys.argv[1], "bin", "trainloop").resolve()
others = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info") and file.locate().resolve() != script}
others -= {"trainloop"}
assert not others, f"the wheel installs {sorted(others)} beside the package"
heavy = {"wandb", "PIL", "tensorboard", "torch.distributed.checkpoint"} & sys.modules.keys()
assert not heavy, f"`import trainloop` loads {sorted(heavy)}"
assert script.is_file(), "the console script is missing"
print("wheel", importlib.metadata.version("trainloop-accelerate"), "imports from outside the repository")
PY
"$work/venv/bin/trainloop" > /dev/null
