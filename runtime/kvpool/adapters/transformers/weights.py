"""A digest of a model's weights, whole: of the files they came from where those are what is in memory, else of memory.

Files are hashed once (SHA-256), and remembered in a small file by path, inode, size, mtime and ctime; a blob of the
Hugging Face hub carries its SHA-256 in its name. Weights that were changed after they were loaded (merged adapters,
training) must not pass for their files, so a sample of each tensor in memory is compared with its file.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvpool.errors import InputError

MAX_REMEMBERED = 1024
_SAMPLES = 256
"""Elements compared per tensor, evenly spread."""
_CHUNK_BYTES = 16 << 20
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_log = logging.getLogger(__name__)


def default_digest_file() -> Path:
    """Where digests of files are remembered: `$XDG_CACHE_HOME/kvpool/weights.json`, or below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvpool" / "weights.json"


def weights_digest(model: Any, digest_file: Path) -> str:
    """Return the digest of all weights of `model`, as `sha256:` and hex digits.

    Raises `InputError` when weights are not in memory (offloaded to disk, on the meta device).
    """
    state = model.state_dict()
    files = weight_files(model)
    if files and _agree(state, files):
        digests = sorted(DigestFile(digest_file).digest(path) for path in files)
        return "sha256:" + hashlib.sha256("\n".join(["files", *digests]).encode()).hexdigest()
    return "sha256:" + _state_digest(state)


def weight_files(model: Any) -> list[Path]:
    """The safetensors files that the model says it was loaded from, local or in the hub's cache; empty if none."""
    name = str(getattr(model, "name_or_path", "") or "")
    single = _located(model, name, _SINGLE)
    if single is not None:
        return [single]
    index = _located(model, name, _INDEX)
    if index is None:
        return []
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    located = [_located(model, name, shard) for shard in shards]
    return [path for path in located if path is not None] if None not in located else []


class DigestFile:
    """SHA-256 digests of files by what the file system says of them. Where it fails, files are hashed again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of the file's content, computed unless it is known."""
        real = path.resolve()
        if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
            return real.name  # the hub's cache names large files by their content
        key = _file_key(real)
        known = self._read()
        if key in known:
            return known[key]
        digest = _hash_file(real)
        if _file_key(real) != key:
            raise InputError(f"{path} was changed while it was read: load the model again")
        self._write({**self._read(), key: digest})
        return digest

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_bytes())
            return {str(key): str(value) for key, value in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            _log.warning("%s cannot be read (%s); weights are hashed again", self._path, error)
            return {}

    def _write(self, digests: Mapping[str, str]) -> None:
        kept = dict(list(digests.items())[-MAX_REMEMBERED:])
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as new:
                json.dump(kept, new, indent=1)
            Path(new.name).replace(self._path)
        except OSError as error:
            _log.warning("%s cannot be written (%s); weights are hashed again at the next start", self._path, error)


def _file_key(path: Path) -> str:
    """Another key whenever the file's content may be another."""
    status = path.stat()
    return json.dumps([str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _located(model: Any, name: str, filename: str) -> Path | None:
    if not name:
        return None
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, filename, revision=getattr(model.config, "_commit_hash", None))
    except HFValidationError:
        return None  # a path that is not here any more
    return Path(found) if isinstance(found, str) else None


def _agree(state: Mapping[str, torch.Tensor], files: list[Path]) -> bool:
    """Whether what is in memory is what the files hold, by a sample of every tensor that both have.

    Tensors that are renamed, fused or quantized on loading are passed over; at least one must have been compared.
    """
    from safetensors import safe_open

    compared = 0
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                here = state.get(name)
                if here is None or not here.is_floating_point() or list(here.shape) != file.get_slice(name).get_shape():
                    continue
                there = _sample(file.get_tensor(name))
                if there.is_floating_point() and not torch.equal(_sample(here).cpu(), there.to(here.dtype)):
                    _log.info("%s is not what %s holds; the weights in memory are hashed", name, path)
                    return False
                compared += 1
    return compared > 0


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    step = max(1, len(flat) // _SAMPLES)
    return flat[step - 1 :: step]


def _state_digest(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(b"state")
    for name in sorted(state):
        tensor = state[name].detach()
        if tensor.is_meta:
            raise InputError(f"{name} is not in memory (offloaded?), so it cannot be hashed: pass weights= with an id")
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().flatten().view(torch.uint8)
        for start in range(0, len(flat), _CHUNK_BYTES):
            digest.update(flat[start : start + _CHUNK_BYTES].cpu().numpy().data)
    return digest.hexdigest()
