"""Resolves the extras of pyproject.toml into the lock files beside this file (`make lock`).

One file an environment: what the tests need, each image, a machine with a GPU, training, the load generator, other
servers. No file names where packages come from; hashes say what they are. Training has none: PyTorch is published in
several builds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCKS = {
    "dev": "3.11",
    "gpu": "3.11",
    "gateway": "3.11",
    "objects": "3.11",
    "steps": "3.10",
    "export": "3.11",
    "perf": "3.11",
    "contenders": "3.11",
    "clients": "3.11",
    "train": "3.11",
}
"""Extra -> Python of the environment. The steps run on the Python of NVIDIA's image."""


def main() -> None:
    """Write every lock file again."""
    uv = Path(sys.executable).with_name("uv")
    for extra, python in LOCKS.items():
        target, overrides = HERE / f"{extra}.lock", HERE / f"{extra}.overrides.txt"
        target.unlink(missing_ok=True)
        subprocess.run(
            [uv, "pip", "compile", HERE.parent / "pyproject.toml", "--quiet", "--extra", extra]
            + ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35", "--no-header"]
            + ["--no-annotate", "--no-emit-index-url", "--output-file", target]
            + ([] if extra == "train" else ["--generate-hashes"])
            + (["--override", overrides] if overrides.exists() else []),
            check=True,
        )
        print(f"{target.name}: {target.read_text().count('==')} packages")


if __name__ == "__main__":
    main()
