"""`python -m kvpool.demo`: plays the demo in two processes, one after the other, and reports.

Exit codes: 0 when all was as it must be; 1 when a block came back other than it was stored, or an answer differs from
that of the same cache kept in memory; 2 when the demo could not be played (the message says what to do).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from kvpool.errors import KvpoolError

OK, FAILED, NOT_PLAYED = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Play the demo, or, as a process that was started for that, one half of it."""
    options = _parse(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        return _play_half(options, console) if options.step else _play_all(options, console)
    except (KvpoolError, OSError) as error:
        console.print(f"kvpool demo: {error}", style="red", markup=False)
        return NOT_PLAYED
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvpool.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pool", type=Path, default=Path("examples/laptop.yaml"), help="the KVCachePool (%(default)s)")
    parser.add_argument("--directory", type=Path, help="the pool's directory, kept afterwards (a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("build"), help="where demo.json and demo.png go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter chats")
    parser.add_argument("--step", choices=("first", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _play_half(options: argparse.Namespace, console: Console) -> int:
    from kvpool.demo.script import FIRST, Setting, play_first, play_second

    setting = Setting(pool=options.pool, directory=options.directory, work=options.work, quick=options.quick)
    (play_first if options.step == FIRST else play_second)(setting, console)
    return OK


def _play_all(options: argparse.Namespace, console: Console) -> int:
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="demo-", dir=options.out))
    try:
        directory = options.directory or work / "pool"
        for step, title in (("first", "First process: chats"), ("second", "Second process: from what lies on SSD")):
            console.rule(title)
            code = _run_half(options, step, directory, work)
            if code:
                return code
        return _report(options.out, work, time.monotonic() - began, console)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_half(options: argparse.Namespace, step: str, directory: Path, work: Path) -> int:
    command = [sys.executable, "-m", "kvpool.demo", "--step", step, "--pool", str(options.pool)]
    command += ["--directory", str(directory), "--work", str(work), *(["--quick"] if options.quick else [])]
    offline = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, env={**os.environ, **offline}, check=False).returncode  # noqa: S603 - ourselves


def _report(out: Path, work: Path, seconds: float, console: Console) -> int:
    from kvpool.demo.plot import draw
    from kvpool.demo.result import Result
    from kvpool.demo.script import FIRST, SECOND, ProcessReport

    result = Result(ProcessReport.read(work / f"{FIRST}.json"), ProcessReport.read(work / f"{SECOND}.json"), seconds)
    result.write(out / "demo.json")
    draw(result, out / "demo.png")
    result.print(console)
    console.print(f"{seconds:.0f} s in all; written: {out / 'demo.json'}, {out / 'demo.png'}", highlight=False)
    return FAILED if result.failures else OK


if __name__ == "__main__":
    sys.exit(main())
