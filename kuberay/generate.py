# ruff: noqa: INP001  a script, not a module of a package
"""Writes the `serveConfigV2` of every kustomization from configs/: `python kuberay/generate.py`.

configs/ is the one source; a test fails while a written file differs from what this would write.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Config file → the patch that carries it.
PATCHES = {
    "configs/cpu.yaml": "kuberay/base/serve-config.yaml",
    "configs/gpu.yaml": "kuberay/overlays/gpu/serve-config.yaml",
    "configs/production.yaml": "kuberay/overlays/production/serve-config.yaml",
}


def patch(config: str) -> str:
    """The kustomize patch that sets a RayService's `serveConfigV2` to the text of one config file."""
    text = (ROOT / config).read_text()
    head = f"""\
# Written by kuberay/generate.py from {config}: change it there.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: shoal
spec:
  serveConfigV2: |
"""
    return head + textwrap.indent(text, "    ")


def main() -> int:
    """Write every patch."""
    for config, path in PATCHES.items():
        (ROOT / path).write_text(patch(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
