"""The text that is scored: what every Python brings along, prose (its reference manual, as `help()` has it) and code.

It changes a little from one version of Python to the next, and the figures with it.
"""

import importlib.util
import pydoc_data.topics
from pathlib import Path

from kvpool.bench.area import UnmeasurableError

_MODULES = (
    "argparse", "ast", "bdb", "calendar", "configparser", "csv", "dataclasses", "difflib", "doctest", "email.message",
    "fractions", "ftplib", "heapq", "http.client", "imaplib", "inspect", "ipaddress", "json.decoder", "locale",
    "mailbox", "optparse", "pdb", "pickle", "pickletools", "platform", "plistlib", "random", "shutil", "smtplib",
    "socket", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback",
    "typing", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom",
)  # fmt: skip
"""Modules of one file each, in Python 3.11 and in those after it."""


def prose() -> str:
    """All topics of Python's reference manual, in alphabetical order."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def code() -> str:
    """The sources of some of the standard library's modules. Raises `UnmeasurableError` where they are not there."""
    return "\n\n".join(_source(name) for name in _MODULES)


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UnmeasurableError(f"this Python came without the source of its module {name}: install another")
    return Path(spec.origin).read_text(encoding="utf-8")
