"""`python -m kvpool.demo`: plays the demo in two processes, one after the other, and reports.

Exit codes: 0 when all was as it must be; 1 when it was not (a block came back other than it was stored, an answer
differs from that of the same cache kept in memory, a tier served nothing, a server did not come back or is left); 2
when the demo could not be played (the message says what to do); 130 after Ctrl-C, with all servers stopped.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from kvpool.errors import KvpoolError

if TYPE_CHECKING:
    from kvpool.demo.servers import Process

OK, FAILED, NOT_PLAYED, INTERRUPTED = 0, 1, 2, 130
ENDING_S = 120.0
"""How long a process may take to stop its servers after Ctrl-C; they save what they hold."""


def main(arguments: list[str] | None = None) -> int:
    """Play the demo, or, as a process that was started for that, one half of it."""
    options = _parse(arguments)
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        with _interrupted_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, once=options.step is not None):
            return _play_half(options, console) if options.step else _play_all(options, console)
    except (KvpoolError, OSError) as error:
        console.print(f"kvpool demo: {error}", style="red", markup=False)
        return _code_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvpool.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pool", type=Path, default=Path("examples/laptop.yaml"), help="the KVCachePool (%(default)s)")
    parser.add_argument("--directory", type=Path, help="the pool's directory, kept afterwards (a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("build"), help="where demo.json and demo.png go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter chats")
    parser.add_argument("--step", choices=("first", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _code_of(error: Exception) -> int:
    from kvpool.demo.servers import NotBackError

    return FAILED if isinstance(error, NotBackError) else NOT_PLAYED


def _play_half(options: argparse.Namespace, console: Console) -> int:
    from kvpool.demo.log_lines import LogLines
    from kvpool.demo.script import FIRST, Setting, play_first, play_second
    from kvpool.local.kernel import die_with_parent

    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[LogLines(console, hidden=options.directory)]
    )
    die_with_parent(signal.SIGTERM)  # where the one who reports is killed, this ends as after Ctrl-C
    setting = Setting(pool=options.pool, directory=options.directory, work=options.work, quick=options.quick)
    (play_first if options.step == FIRST else play_second)(setting, console)
    return OK


def _play_all(options: argparse.Namespace, console: Console) -> int:
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="demo-", dir=options.out))
    left: list[Process] = []
    try:
        directory = options.directory or work / "pool"
        for step, title in (("first", "First process: chats"), ("second", "Second process: from what lies on disk")):
            console.rule(title)
            code = _run_half(options, step, directory, work, console, left)
            if code:
                return code
        return _report(options.out, work, time.monotonic() - began, left, console)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run_half(
    options: argparse.Namespace, step: str, directory: Path, work: Path, console: Console, left: "list[Process]"
) -> int:
    """One half, in a process of its own; its exit code. Servers that outlive it are told, and added to `left`."""
    from kvpool.demo.servers import PROCESSES, left_running, read_processes

    command = [sys.executable, "-m", "kvpool.demo", "--step", step, "--pool", str(options.pool)]
    command += ["--directory", str(directory), "--work", str(work), *(["--quick"] if options.quick else [])]
    settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    settings |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait must not take the cores from the pool's servers
    try:
        code = _wait_for(subprocess.Popen(command, env={**os.environ, **settings}), console)  # noqa: S603 - ourselves
    finally:
        stayed = [process for process in left_running(read_processes(work / PROCESSES)) if process not in left]
        for process in stayed:
            text = f"left running: {process.name} ({process.version}), process {process.pid}"
            console.print(text, style="bold red", highlight=False)
        left += stayed
    if code < 0:
        console.print(f"kvpool demo: the process was ended by signal {-code}", style="red")
        return FAILED
    return code


def _wait_for(half: "subprocess.Popen[bytes]", console: Console) -> int:
    """Its exit code. Ctrl-C lets it stop its servers; a second one kills it, and they stop all the same."""
    try:
        return half.wait()
    except KeyboardInterrupt:
        console.print("ending: the pool's servers are stopped", style="dim")
        try:
            half.send_signal(signal.SIGTERM)  # from a terminal it has had Ctrl-C too, and takes the first of both
            half.wait(ENDING_S)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            half.kill()
        raise
    finally:
        if half.poll() is None:
            half.kill()
            half.wait()


def _report(out: Path, work: Path, seconds: float, left: "list[Process]", console: Console) -> int:
    from kvpool.demo.plot import draw
    from kvpool.demo.result import Result
    from kvpool.demo.script import FIRST, SECOND, ProcessReport

    first, second = (ProcessReport.read(work / f"{step}.json") for step in (FIRST, SECOND))
    result = Result(first, second, seconds, left_running=tuple(left))
    result.write(out / "demo.json")
    draw(result, out / "demo.png")
    result.print(console)
    console.print(f"{seconds:.0f} s in all; written: {out / 'demo.json'}, {out / 'demo.png'}", highlight=False)
    return FAILED if result.failures else OK


@contextmanager
def _interrupted_by(*numbers: signal.Signals, once: bool) -> Iterator[None]:
    """Each of these signals is as Ctrl-C for the time of the context. `once`: after the first, no more are taken."""
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as `nohup` has it

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        if once:
            for each in taken:
                signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
