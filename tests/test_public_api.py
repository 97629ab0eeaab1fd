"""The public face: what ``from gist_rag import ...`` promises."""

from __future__ import annotations

import subprocess
import sys

import gist_rag


def test_all_is_sorted_and_importable() -> None:
    constants_first = sorted(gist_rag.__all__, key=lambda name: (not name.isupper(), name))
    assert gist_rag.__all__ == constants_first
    assert all(getattr(gist_rag, name) is not None for name in gist_rag.__all__)


def test_all_is_what_the_lazy_table_holds() -> None:
    assert set(gist_rag.__all__) == set(gist_rag._HOMES)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, gist_rag; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_container_folders_cannot_be_imported(tmp_path: object) -> None:
    code = (
        "import importlib.util as u, sys;"
        "sys.exit(any(u.find_spec(n) for n in ('integrations', 'examples')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path)).returncode == 0
