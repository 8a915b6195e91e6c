"""The demo's two processes: the first plays the chats and closes the pool, the second answers from what lies on SSD."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from kvpool.adapters.transformers import TransformersCache
from kvpool.config import load_config
from kvpool.demo.audit import AuditedPool, Ledger
from kvpool.demo.chats import CHATS, Chat, handbook
from kvpool.demo.measure import FirstTokenFigures, first_token, prompt_of
from kvpool.demo.memory import InMemoryBlocks
from kvpool.demo.neighbour import PROMPTS_A_ROUND, QUICK_PROMPTS, Neighbour, NeighbourReport
from kvpool.demo.smollm2 import NAME, ChatModel, is_converted, load_smollm2
from kvpool.demo.turn import Player, TurnReport
from kvpool.pool.pool import Pool

FIRST, SECOND = "first", "second"
HEADLINE_TOKENS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is played, where."""

    pool: Path
    directory: Path
    """The pool's."""
    work: Path
    """Where one process leaves what the next needs."""
    quick: bool

    @property
    def chats(self) -> tuple[Chat, ...]:
        """All chats, or a short one of each tenant."""
        if not self.quick:
            return CHATS
        return tuple(chat._replace(questions=chat.questions[:1]) for chat in CHATS if chat.number == 1)

    @property
    def rounds(self) -> int:
        """How many turns the longest chat has in the first process."""
        return max(len(chat.questions) for chat in self.chats)

    @property
    def neighbours_prompts(self) -> int:
        """How many prompts the second model has after each round."""
        return QUICK_PROMPTS if self.quick else PROMPTS_A_ROUND

    @property
    def answer_tokens(self) -> int:
        """How long answers get at most."""
        return 8 if self.quick else 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """What one process did; written as JSON for the process that reports."""

    turns: tuple[TurnReport, ...]
    chats: dict[str, list[int]]
    """Every chat's tokens, by tenant and number."""
    hashes: dict[str, str]
    blocks_stored: int
    blocks_checked: int
    blocks_wrong: int
    stats: dict[str, Any]
    block_tokens: int
    first_token: FirstTokenFigures | None
    neighbour: NeighbourReport | None

    def write(self, path: Path) -> None:
        """Write it for the next process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "ProcessReport":
        """Read what `write` has written."""
        content = json.loads(path.read_bytes())
        figures, neighbour = content.pop("first_token"), content.pop("neighbour")
        turns = tuple(TurnReport(**turn) for turn in content.pop("turns"))
        return cls(
            **content,
            turns=turns,
            first_token=FirstTokenFigures(**figures) if figures else None,
            neighbour=NeighbourReport(**neighbour) if neighbour else None,
        )


def play_first(setting: Setting, console: Console) -> None:
    """Play all chats, turn by turn in rotation, so that each waits while the others need the memory; then close.

    Between the rounds a second model stores more than its share.
    """
    with _loaded(setting, console) as (chat_model, pool):
        for tenant in sorted({chat.tenant for chat in setting.chats}):
            pool.erase(tenant=tenant)  # what an earlier demo left here is not to be served
        memory = InMemoryBlocks(pool.config.block_tokens)
        ledger, player = _player(setting, chat_model, pool, {}, memory)
        neighbour = Neighbour(pool, ledger, other=NAME)
        chats: dict[str, list[int]] = {}
        turns = []
        for turn in range(setting.rounds):
            for chat in setting.chats:
                if turn < len(chat.questions):
                    turns.append(_play(1, chat, turn, chat.questions[turn], chats, chat_model, player, console))
            with console.status(f"{setting.neighbours_prompts} prompts of another model, above its share"):
                neighbour.run(turn * setting.neighbours_prompts, setting.neighbours_prompts)
        with console.status(f"measuring a prompt of {HEADLINE_TOKENS:,} tokens"):
            figures = _headline(setting, chat_model, pool)
        report = _report(turns, chats, ledger, player, pool, neighbour, figures)
        console.print("closing the pool: what is only in ram goes down to ssd", style="dim")
    memory.save(setting.work / "memory.safetensors")
    report.write(setting.work / f"{FIRST}.json")


def play_second(setting: Setting, console: Console) -> None:
    """Ask every chat one question more, in a new process, with the pool as the first one left it."""
    before = ProcessReport.read(setting.work / f"{FIRST}.json")
    with _loaded(setting, console) as (chat_model, pool):
        restored = pool.stats().restored
        console.print(f"the pool is open again: {restored.blocks} blocks found on ssd in {restored.seconds:.2f} s")
        memory = InMemoryBlocks.load(setting.work / "memory.safetensors", pool.config.block_tokens)
        ledger, player = _player(setting, chat_model, pool, before.hashes, memory)
        neighbour = Neighbour(pool, ledger, other=NAME)
        chats = dict(before.chats)
        turns = [
            _play(2, chat, len(chat.questions), chat.later, chats, chat_model, player, console)
            for chat in setting.chats
        ]
        neighbour.run((setting.rounds - 1) * setting.neighbours_prompts, setting.neighbours_prompts)
        report = _report(turns, chats, ledger, player, pool, neighbour, None)
    report.write(setting.work / f"{SECOND}.json")


@contextmanager
def _loaded(setting: Setting, console: Console) -> Iterator[tuple[ChatModel, Pool]]:
    waiting = "" if is_converted() else " (converting it, once: half a minute)"
    with console.status(f"loading SmolLM2-135M-Instruct{waiting}"):
        chat_model = load_smollm2()
    with Pool.open(load_config(setting.pool), directory=setting.directory) as pool:
        yield chat_model, pool


def _player(
    setting: Setting, chat_model: ChatModel, pool: Pool, hashes: dict[str, str], memory: InMemoryBlocks
) -> tuple[Ledger, Player]:
    ledger = Ledger(hashes)
    cache = TransformersCache(AuditedPool(pool, ledger), chat_model.model, name=NAME)
    return ledger, Player(chat_model, cache, ledger, memory, setting.answer_tokens)


def _play(
    process: int,
    chat: Chat,
    turn: int,
    question: str,
    chats: dict[str, list[int]],
    chat_model: ChatModel,
    player: Player,
    console: Console,
) -> TurnReport:
    name = f"{chat.tenant} {chat.number}"
    so_far = chats.get(name)
    prompt = chat_model.follow_up(so_far, question) if so_far else chat_model.opening(handbook(), question)
    with console.status(f"{name}, turn {turn + 1}: {len(prompt):,} tokens, cold, through the pool, and from memory"):
        report, chats[name] = player.play(process, chat.tenant, chat.number, turn + 1, question, prompt)
    served = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in report.served_tokens.items()) or "none held"
    console.print(
        f"{name}, turn {turn + 1}: {report.prompt_tokens:,} tokens, {served}; "
        f"first token after {report.pool_s:.2f} s, cold {report.cold_s:.2f} s"
    )
    console.print(f"  {question}", style="dim", highlight=False)
    console.print(f"  {report.answer}", style="dim italic", highlight=False)
    return report


def _headline(setting: Setting, chat_model: ChatModel, pool: Pool) -> FirstTokenFigures:
    rounds, cold_rounds = (3, 1) if setting.quick else (7, 2)
    cache = TransformersCache(pool, chat_model.model, name=NAME)
    prompt = prompt_of(chat_model, HEADLINE_TOKENS)
    return first_token(cache, prompt, rounds=rounds, cold_rounds=cold_rounds, tenant="headline")


def _report(
    turns: list[TurnReport],
    chats: dict[str, list[int]],
    ledger: Ledger,
    player: Player,
    pool: Pool,
    neighbour: Neighbour,
    figures: FirstTokenFigures | None,
) -> ProcessReport:
    return ProcessReport(
        turns=tuple(turns),
        chats=chats,
        hashes=ledger.hashes,
        blocks_stored=ledger.stored,
        blocks_checked=ledger.checked,
        blocks_wrong=len(ledger.wrong) + len(player.mismatched_copies),
        stats=asdict(pool.stats()),
        block_tokens=pool.config.block_tokens,
        first_token=figures,
        neighbour=neighbour.report(),
    )
