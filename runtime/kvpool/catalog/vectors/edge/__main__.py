"""`python -m kvpool.catalog.vectors.edge serve ...` or `build ...`: started by `kvpool` itself, not by people."""

import signal
import socket
import sys
import time
from pathlib import Path

from kvpool.catalog.vectors.edge.frames import Channel, Frame


def main(arguments: list[str]) -> None:
    """Serve a directory until the parent ends, or build a graph."""
    match arguments:
        case ["serve", directory, max_points, index_after, searches, updates]:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
            channels = [Channel(socket.socket(fileno=int(fd))) for fd in (searches, updates)]
            try:
                from kvpool.catalog.vectors.edge.serving import serve
            except ImportError as error:
                channels[0].send(Frame(0, {"error": f"{error}: install kvpool[local]"}), time.monotonic() + 10)
                sys.exit(1)
            serve(Path(directory), channels[0], channels[1], max_points=int(max_points), index_after=int(index_after))
        case ["build", original, copy, parent]:
            from kvpool.catalog.vectors.edge.building import build

            build(Path(original), Path(copy), int(parent))
        case _:
            sys.exit("kvpool starts this by itself")


if __name__ == "__main__":
    main(sys.argv[1:])
