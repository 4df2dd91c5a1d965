"""What is installed is what is in the tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APP = """
from catga_tasks import Catga

app = Catga("shop", broker="redis://127.0.0.1:1/0", outbox="sqlite:///shop.db")
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist, which is built from a copy of what git knows."""
    source = tmp_path_factory.mktemp("source")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_tree(wheel):
    """Every module below catga_tasks/ and migrations/ is in the wheel, and no other."""
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"catga_tasks/{p.relative_to(ROOT / 'catga_tasks')}" for p in (ROOT / "catga_tasks").rglob("*.py")}
    expected |= {
        f"catga_tasks/migrations/{p.relative_to(ROOT / 'migrations')}" for p in (ROOT / "migrations").rglob("*.py")
    }
    expected |= {"catga_tasks/py.typed", "catga_tasks/migrations/script.py.mako"}
    pages = [*(ROOT / "catga_tasks/templates").iterdir(), *(ROOT / "catga_tasks/static").iterdir()]
    assert shipped == expected | {f"catga_tasks/{page.relative_to(ROOT / 'catga_tasks')}" for page in pages}


def test_the_installed_wheel_migrates(wheel, tmp_path):
    """In a fresh virtual environment the wheel's command makes the tables."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # The dependencies come from this environment; the package itself must not.
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here)
    (tmp_path / "shop.py").write_text(APP)
    where = run(python, "-c", "import catga_tasks; print(catga_tasks.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    run(python, "-m", "celery", "-A", "shop", "outbox", "migrate", cwd=tmp_path)
    run(python, "-m", "celery", "-A", "shop", "outbox", "migrate", "--check", cwd=tmp_path)
    count = (
        "import sqlite3; print(sqlite3.connect('shop.db').execute('select count(*) from catga_outbox').fetchone()[0])"
    )
    assert run(python, "-c", count, cwd=tmp_path).strip() == "0"
