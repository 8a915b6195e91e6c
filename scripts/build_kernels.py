"""Compiles the codecs' kernels, in place: `python scripts/build_kernels.py`. Packaging calls this too.

Where there is no C compiler, packages are made without them, and the codecs use torch on the CPU as well, which is
several times slower. CC names the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # called by hand
    BuildHookInterface = object

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "runtime/kvpool/codecs/cpu"
LIBRARY = SOURCES / "libkvpool_codecs.so"
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
"""Without contraction: fused operations would round otherwise than those of other devices."""
FAST = ["-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]


class KernelsHook(BuildHookInterface):
    """Hatchling calls it before it makes a wheel, or installs this directory."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the compiled kernels to the wheel, which then is for this kind of machine only."""
        if self.target_name != "wheel" or not build():
            return
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{machine}"
        build_data["artifacts"].append(f"/{LIBRARY.relative_to(ROOT)}")


def build() -> bool:
    """Compile the library, and say whether that was possible."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return _without("no C compiler was found")
    with tempfile.TemporaryDirectory(dir=SOURCES) as place:
        try:
            made = _compiled(compiler.split(), Path(place))
        except (OSError, subprocess.CalledProcessError) as error:
            return _without(f"they cannot be compiled here ({getattr(error, 'stderr', '') or error})")
        made.replace(LIBRARY)
    return True


def _compiled(compiler: list[str], place: Path) -> Path:
    """For any processor of this kind, and, on x86-64, for those since 2013 too."""
    objects = [_object(compiler, place, "kernels.c", "base")]
    if platform.machine() in ("x86_64", "AMD64"):
        objects.append(_object(compiler, place, "kernels.c", "fast", *FAST))
    objects.append(_object(compiler, place, "level.c", "level", f"-DHAS_FAST={len(objects) - 1}"))
    library = place / LIBRARY.name
    _run([*compiler, "-shared", "-o", str(library), *map(str, objects)])
    return library


def _object(compiler: list[str], place: Path, source: str, level: str, *flags: str) -> Path:
    made = place / f"{level}.o"
    defined = [f"-DLEVEL={level}", f'-DSOURCES="{digest()}"']
    _run([*compiler, *FLAGS, *flags, *defined, "-c", "-o", str(made), str(SOURCES / source)])
    return made


def digest() -> str:
    """Of the sources: a library that was made of others is not loaded. As `kvpool.codecs.cpu.kernels` computes it."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603


def _without(reason: str) -> bool:
    print(f"the codecs' kernels are left out: {reason}", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(not build())
