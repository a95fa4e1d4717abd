"""The wheel holds the engine alone and runs from anywhere; an editable install gives every room of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import hybrid_sp
from tests.support.packages import needs

pytestmark = needs("setuptools")  # whoever looks for pip makes setuptools refuse to be imported in this process

ROOT = Path(__file__).parents[1]
ROOMS = ["hybrid_sp", "layers", "recipes", "analysis", "tests"]
FROM_THE_WHEEL = """
import sys
from importlib import metadata
from pathlib import Path
target, checkout = map(Path, sys.argv[1:])
sys.path[:] = [str(target), *(path for path in sys.path if Path(path).resolve() != checkout)]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]

import torch
import hybrid_sp as hsp

q, k, v = torch.randn(3, 1, 7, 2, 4, dtype=torch.float64).unbind()
o = hsp.linear_attention(q, k, v, scale=1.0)
scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, v))

assert hsp.__version__ == metadata.version("hybrid_sp")
loaded = {Path(module.__file__) for name, module in sys.modules.items() if name.partition(".")[0] == "hybrid_sp"}
assert len(loaded) > 10 and all(target in file.parents for file in loaded), loaded
"""


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are made of, since setuptools writes beside it."""
    copy = tmp_path_factory.mktemp("checkout")
    for room in ROOMS:
        names = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml", ".json", ".typed")]
        for path in names:
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    run("-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), ".", cwd=checkout)
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_holds_the_engine_alone(wheel: Path) -> None:
    files = set(ZipFile(wheel).namelist())
    about = f"hybrid_sp-{hybrid_sp.__version__}.dist-info"
    engine = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hybrid_sp").rglob("*.py")}
    data = {"hybrid_sp/py.typed", "hybrid_sp/kernels/gpu/tuned.json"}
    assert {name for name in files if not name.startswith(f"{about}/")} == engine | data
    metadata = Parser().parsestr(ZipFile(wheel).read(f"{about}/METADATA").decode())
    needed = {one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one}
    assert needed == {"torch>=2.11", "einops>=0.8"}


def test_a_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    assert {path.name.partition("-")[0] for path in target.iterdir()} == {"hybrid_sp"}
    run("-c", FROM_THE_WHEEL, str(target), str(ROOT), cwd=tmp_path)


def test_an_editable_install_puts_the_checkout_on_the_path(checkout: Path, tmp_path: Path) -> None:
    """So every room can be imported from any folder, and not the engine alone."""
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run("-c", build, str(tmp_path), cwd=checkout)
    (made,) = tmp_path.glob("*.whl")
    paths = [ZipFile(made).read(name).decode() for name in ZipFile(made).namelist() if name.endswith(".pth")]
    assert [Path(path.strip()).resolve() for path in paths] == [checkout.resolve()]


def test_the_changelog_speaks_of_this_version() -> None:
    assert hybrid_sp.__version__ in (ROOT / "CHANGELOG.md").read_text()
