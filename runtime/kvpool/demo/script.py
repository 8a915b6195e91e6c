"""The demo's two processes: the first plays the chats and closes the pool, the second answers from what is on disk."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from kvpool.adapters.transformers import TransformersCache
from kvpool.config import RuntimeConfig, load_config
from kvpool.demo.audit import AuditedPool, Ledger
from kvpool.demo.catalog import CatalogReport, ask_catalog
from kvpool.demo.chats import CHATS, Chat, half_handbook, handbook
from kvpool.demo.measure import FirstTokenFigures, first_token, prompt_of
from kvpool.demo.memory import InMemoryBlocks
from kvpool.demo.neighbour import PROMPTS_A_ROUND, QUICK_PROMPTS, TENANT, Neighbour, NeighbourReport
from kvpool.demo.servers import PROCESSES, How, OutageReport, Servers
from kvpool.demo.smollm2 import NAME, ChatModel, load_smollm2
from kvpool.demo.turn import Player, TurnReport
from kvpool.errors import SharedTierOutError
from kvpool.pool.pool import Pool
from kvpool.pool.remote.servers import QDRANT

FIRST, SECOND = "first", "second"
HEADLINE, HEADLINE_TOKENS, QUICK_HEADLINE_TOKENS = "headline", 2000, 800
SHARED_DEADLINE_S = 20.0
"""How long a prompt waits for shared tiers. Long: what is shown must not depend on how busy this machine is."""
FLUSH_S = 60.0
TIER_OF = {"dragonfly": "dragonfly", "postgres": "database", QDRANT: QDRANT}
"""What is out while the server of this name is."""


class Outage(NamedTuple):
    """A server that is away during one turn."""

    process: int
    chat: str
    """Its company and number."""
    turn: int
    """From 1 on."""
    server: str
    how: How


OUTAGES = (
    Outage(1, "globex 2", 1, "dragonfly", How.STOPPED),
    Outage(1, "acme 2", 2, "postgres", How.STOPPED),
    Outage(1, "globex 2", 2, QDRANT, How.KILLED),
    Outage(1, "acme 1", 3, "postgres", How.KILLED),
    Outage(1, "acme 2", 3, "dragonfly", How.KILLED),
    Outage(2, "globex 2", 4, "dragonfly", How.STOPPED),
)
QUICK_OUTAGES = (
    Outage(1, "acme 2", 1, QDRANT, How.KILLED),
    Outage(1, "globex 2", 1, "dragonfly", How.STOPPED),
    Outage(2, "globex 1", 2, "postgres", How.STOPPED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is played, where."""

    pool: Path
    directory: Path
    """The pool's."""
    work: Path
    """Where one process leaves what the next needs."""
    quick: bool
    load_model: Callable[[], ChatModel] = load_smollm2

    @property
    def config(self) -> RuntimeConfig:
        """The pool's; quick chats are half as long, and so is the ram tier."""
        config = load_config(self.pool)
        if not self.quick:
            return config
        plain = config.model_dump(mode="json", by_alias=True)
        plain["ram"]["capacityBytes"] = config.ram.capacity_bytes // 2
        return RuntimeConfig.model_validate(plain)

    @property
    def chats(self) -> tuple[Chat, ...]:
        """All chats, or only how each begins."""
        return tuple(chat._replace(questions=chat.questions[:1]) for chat in CHATS) if self.quick else CHATS

    @property
    def later_chats(self) -> tuple[Chat, ...]:
        """Those that go on in the second process."""
        return tuple(chat for chat in self.chats if chat.number == 1) if self.quick else self.chats

    @property
    def outages(self) -> tuple[Outage, ...]:
        """What is stopped when."""
        return QUICK_OUTAGES if self.quick else OUTAGES

    @property
    def system_prompt(self) -> str:
        """How all chats begin."""
        return half_handbook() if self.quick else handbook()

    @property
    def headline_tokens(self) -> int:
        """How long the prompt is whose first token is measured."""
        return QUICK_HEADLINE_TOKENS if self.quick else HEADLINE_TOKENS

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
    outages: tuple[OutageReport, ...] = ()
    first_token: FirstTokenFigures | None
    neighbour: NeighbourReport | None
    catalog: CatalogReport | None = None

    def write(self, path: Path) -> None:
        """Write it for the next process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "ProcessReport":
        """Read what `write` has written."""
        content = json.loads(path.read_bytes())
        figures, neighbour, catalog = (content.pop(name) for name in ("first_token", "neighbour", "catalog"))
        turns = tuple(TurnReport(**{**turn, "out": tuple(turn["out"])}) for turn in content.pop("turns"))
        outages = (OutageReport(**{**outage, "how": How(outage["how"])}) for outage in content.pop("outages"))
        return cls(
            **content,
            turns=turns,
            outages=tuple(outages),
            first_token=FirstTokenFigures(**figures) if figures else None,
            neighbour=NeighbourReport(**neighbour) if neighbour else None,
            catalog=CatalogReport(**catalog) if catalog else None,
        )


def play_first(setting: Setting, console: Console) -> None:
    """Play all chats, turn by turn in rotation, so that each waits while the others need the memory; then close.

    Between the rounds a second model stores more than its share. Servers are stopped and killed meanwhile. Raises
    `NotBackError` where one of them is not in use again.
    """
    with _opened(setting, console) as (chat_model, pool):
        _forget_an_earlier_demo(pool, setting)
        stage = Stage(setting, 1, chat_model, pool, console, hashes={}, memory=InMemoryBlocks(pool.config.block_tokens))
        for turn in range(setting.rounds):
            for chat in setting.chats:
                if turn < len(chat.questions):
                    stage.play(chat, turn, chat.questions[turn])
            stage.play_neighbour(turn)
        catalog = stage.ask_catalog()
        with console.status(f"measuring a prompt of {setting.headline_tokens:,} tokens"):
            figures = _headline(setting, chat_model, pool)
        report = stage.report(figures, catalog)
        console.print("closing the pool: what is only in ram goes down to ssd; its servers are stopped", style="dim")
    stage.memory.save(setting.work / "memory.safetensors")
    report.write(setting.work / f"{FIRST}.json")


def play_second(setting: Setting, console: Console) -> None:
    """Ask chats one question more, in a new process, with the pool as the first one left it. Raises `NotBackError`."""
    before = ProcessReport.read(setting.work / f"{FIRST}.json")
    with _opened(setting, console) as (chat_model, pool):
        restored = pool.stats().restored
        console.print(f"{restored.blocks} blocks found on ssd in {restored.seconds:.2f} s")
        memory = InMemoryBlocks.load(setting.work / "memory.safetensors", pool.config.block_tokens)
        stage = Stage(setting, 2, chat_model, pool, console, hashes=before.hashes, memory=memory)
        stage.chats = dict(before.chats)
        for chat in setting.later_chats:
            stage.play(chat, len(chat.questions), chat.later)
        stage.play_neighbour(setting.rounds - 1)
        report = stage.report(None, None)
    report.write(setting.work / f"{SECOND}.json")


class Stage:
    """One process's part: a pool, a model on it, and the turns that were played."""

    def __init__(
        self,
        setting: Setting,
        process: int,
        chat_model: ChatModel,
        pool: Pool,
        console: Console,
        *,
        hashes: dict[str, str],
        memory: InMemoryBlocks,
    ) -> None:
        self.chats: dict[str, list[int]] = {}
        self.memory = memory
        self._setting = setting
        self._process = process
        self._chat_model = chat_model
        self._pool = pool
        self._console = console
        self._turns: list[TurnReport] = []
        self._ledger = Ledger(hashes)
        cache = TransformersCache(
            AuditedPool(pool, self._ledger), chat_model.model, name=NAME, shared_deadline_s=SHARED_DEADLINE_S
        )
        self._player = Player(chat_model, cache, self._ledger, memory, setting.answer_tokens)
        self._neighbour = Neighbour(pool, self._ledger, other=NAME)
        self._servers = Servers(pool, setting.work / PROCESSES)
        self._servers.wait_until_all_answer()
        running = ", ".join(f"{server.name} ({server.version})" for server in self._servers.note())
        console.print(f"the pool is open; its servers: {running or 'none'}", highlight=False)

    def play(self, chat: Chat, turn: int, question: str) -> None:
        """One turn, counted from 0, with the servers away that are to be. Raises `NotBackError`."""
        name = f"{chat.tenant} {chat.number}"
        so_far = self.chats.get(name)
        prompt = (
            self._chat_model.follow_up(so_far, question)
            if so_far
            else self._chat_model.opening(self._setting.system_prompt, question)
        )
        self._settle()
        with self._away(name, turn + 1) as away, self._console.status(f"{name}, turn {turn + 1}"):
            fell_out = self._fell_out()
            report, self.chats[name] = self._player.play(
                self._process, chat.tenant, chat.number, turn + 1, question, prompt
            )
            if QDRANT in away:  # no prompt waits for it, so nobody may have asked it yet
                with suppress(SharedTierOutError):
                    self._pool.find(NAME, chat.tenant, similar_to=prompt, limit=1)
            out = {*away, *(tier for tier, times in self._fell_out().items() if times > fell_out[tier])}
            self._turns.append(replace(report, out=tuple(sorted(out))))
            self._tell(name, self._turns[-1])

    def play_neighbour(self, turn: int) -> None:
        """The second model's part of a round."""
        count = self._setting.neighbours_prompts
        with self._console.status(f"{count} prompts of another model, above its share"):
            self._neighbour.run(turn * count, count)

    def ask_catalog(self) -> CatalogReport | None:
        """What the catalog says of the first chat, once all answer. None where the pool has none."""
        if self._pool.config.database is None:
            return None
        self._settle()
        chat = self._setting.chats[0]
        prompt = self._chat_model.follow_up(self.chats[f"{chat.tenant} {chat.number}"], chat.later)
        return ask_catalog(self._pool, NAME, chat.tenant, prompt)

    def report(self, figures: FirstTokenFigures | None, catalog: CatalogReport | None) -> ProcessReport:
        """What was played, once all tiers are in use. Raises `NotBackError`."""
        self._settle()
        return ProcessReport(
            turns=tuple(self._turns),
            chats=self.chats,
            hashes=self._ledger.hashes,
            blocks_stored=self._ledger.stored,
            blocks_checked=self._ledger.checked,
            blocks_wrong=len(self._ledger.wrong) + len(self._player.mismatched_copies),
            stats=asdict(self._pool.stats()),
            block_tokens=self._pool.config.block_tokens,
            outages=tuple(self._servers.outages),
            first_token=figures,
            neighbour=self._neighbour.report(),
            catalog=catalog,
        )

    def _settle(self) -> None:
        """Let what was stored arrive in all tiers, so that turns do not depend on how busy the machine is."""
        self._pool.flush(FLUSH_S)
        self._servers.wait_until_all_answer()

    @contextmanager
    def _away(self, chat: str, turn: int) -> Iterator[set[str]]:
        """The tiers that are away during this turn; they are in use again afterwards."""
        at = (self._process, chat, turn)
        planned = next((outage for outage in self._setting.outages if outage[:3] == at), None)
        server = None if planned is None else self._servers.running(planned.server)
        if planned is None or server is None:
            yield set()
            return
        self._say(f"{server.name} ({server.version}, process {server.pid}) is {planned.how.value} meanwhile")
        with self._servers.out(server, planned.how, f"{chat}.{turn}"):
            yield {TIER_OF[server.name]}
        since = "after it went on" if planned.how is How.STOPPED else "after the kill, started again by the pool"
        self._say(f"{server.name} is in use {self._servers.outages[-1].back_s:.1f} s {since}")

    def _say(self, text: str) -> None:
        self._console.print(text, style="yellow", highlight=False)

    def _tell(self, name: str, report: TurnReport) -> None:
        served = ", ".join(f"{tokens:,} from {tier}" for tier, tokens in report.served_tokens.items()) or "none held"
        self._console.print(
            f"{name}, turn {report.turn}: {report.prompt_tokens:,} tokens, {served}; "
            f"first token after {report.pool_s:.2f} s, cold {report.cold_s:.2f} s"
        )
        self._console.print(f"  {report.question}", style="dim", highlight=False)
        self._console.print(f"  {report.answer}", style="dim italic", highlight=False)

    def _fell_out(self) -> dict[str, int]:
        return {tier.value: shared.fell_out for tier, shared in self._pool.stats().shared.items()}


@contextmanager
def _opened(setting: Setting, console: Console) -> Iterator[tuple[ChatModel, Pool]]:
    """The model and the pool; after Ctrl-C it is closed without writing down what is in ram."""
    with console.status("loading the model; the first time ever it is converted, which takes half a minute"):
        chat_model = setting.load_model()
    with console.status("opening the pool: its servers are started"):
        pool = Pool.open(setting.config, directory=setting.directory)
    with pool:
        try:
            yield chat_model, pool
        except KeyboardInterrupt:
            pool.close(deadline_s=0)
            raise


def _forget_an_earlier_demo(pool: Pool, setting: Setting) -> None:
    """What one left in this directory is not to be served."""
    if pool.known_models():
        for tenant in sorted({HEADLINE, TENANT, *(chat.tenant for chat in setting.chats)}):
            pool.erase(tenant=tenant)


def _headline(setting: Setting, chat_model: ChatModel, pool: Pool) -> FirstTokenFigures:
    rounds, cold_rounds = (3, 1) if setting.quick else (7, 2)
    cache = TransformersCache(pool, chat_model.model, name=NAME)
    prompt = prompt_of(chat_model, setting.headline_tokens)
    return first_token(cache, prompt, rounds=rounds, cold_rounds=cold_rounds, tenant=HEADLINE)
