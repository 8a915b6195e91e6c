"""What is played: two companies that rent bikes to their people, chatting with the same service desk."""

from importlib.resources import files
from typing import NamedTuple


class Chat(NamedTuple):
    """One conversation: a question per turn, and one for the second process."""

    tenant: str
    number: int
    questions: tuple[str, ...]
    later: str


CHATS = (
    Chat(
        "acme",
        1,
        (
            "How much is a day pass for an electric bike?",
            "How high is the deposit for a cargo bike?",
            "How long does a test ride last?",
        ),
        "When are bikes from the rental fleet sold?",
    ),
    Chat(
        "globex",
        1,
        (
            "How far does the battery of the Night Heron last?",
            "And how long does it take to charge it?",
            "How much is a day pass for a cargo bike?",
        ),
        "How long does a test ride last?",
    ),
    Chat(
        "acme",
        2,
        (
            "My city bike was stolen. When do I have to report it?",
            "And to whom?",
            "How high is the deposit for an electric bike?",
        ),
        "How far does the battery of the Night Heron last?",
    ),
    Chat(
        "globex",
        2,
        (
            "When are bikes from the rental fleet sold?",
            "What does a normal inspection of a cargo bike cost?",
            "When is the workshop open on Saturday?",
        ),
        "How high is the deposit for a city bike?",
    ),
)
"""In the order of their turns: the two of one company, which share the handbook, never follow each other."""


def handbook() -> str:
    """The system prompt that all chats share: 1,542 tokens for SmolLM2."""
    return (files("kvpool.demo") / "handbook.txt").read_text(encoding="utf-8").strip()


def half_handbook() -> str:
    """Its first chapters, about half of it."""
    chapters = handbook().split("\n\n")
    return "\n\n".join(chapters[: len(chapters) // 2 + 1])
