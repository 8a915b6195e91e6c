"""The command line as it is typed and as `--help` shows it. Commands live in modules of their own, imported when used.

Each function here turns what was typed into the call that does it, and does nothing itself: what that raises, and
Ctrl-C, are ours to report and not typer's. `kvpool version` and `kvpool --help` start at once, for neither numpy nor
rich nor torch is imported for them.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from kvpool.cli.exits import ExitCode, complain, ended

_EXIT_CODES = """
\b
Exit codes:
    0  done
    1  what was asked for could not be done
    2  the command line, a configuration or an input file is not right
    3  another process holds the pool's directory
  130  interrupted by Ctrl-C        141  the reader of the output went away
  143  ended by SIGTERM

`kvpool run` ends with 0 after Ctrl-C and SIGTERM, for that is how it is ended.
"""
_UsageError: Any = typer.BadParameter.__mro__[2]
"""What is wrong with a command line: click's own exception, wherever this version of typer keeps click."""

Action: TypeAlias = Callable[[], None]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for scripts.")]
Directory = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The pool's directory. Default: ~/.local/share/kvpool/NAME, by the pool's name."),
]


@app.callback(invoke_without_command=True, epilog=_EXIT_CODES)
def kvpool(context: typer.Context) -> None:
    """Keep the attention keys and values of LLM prompts, so that the next prompt does not pay for them again.

    \b
    Examples:
      kvpool status --config examples/laptop.yaml    what is in force, and where each value comes from
      kvpool run examples/laptop.yaml                open that pool on this machine, and show it live
      kvpool quota pool.yaml llama-8b ram.limit=8Gi  what a model may use, while the pool runs
      kvpool warm pool.yaml prompts.jsonl --shared   store prompts before anybody asks
      kvpool explain --pool pool.yaml --model llama-8b --tokens prompt.json
      kvpool replay trace.jsonl.gz --capacity-blocks 2k,10k,50k
      kvpool bench                                   measure this machine
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


@app.command()
def run(
    pool: Annotated[Path, typer.Argument(metavar="POOL.YAML", help="A KVCachePool, or a RuntimeConfig.")],
    directory: Directory = None,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Seconds between lines where there is no terminal.")
    ] = 10.0,
    json: Json = False,
) -> Action:
    """Open a pool on this machine and show it until Ctrl-C.

    On a terminal the picture is live; in a pipe, a line is printed every few seconds. Ctrl-C or SIGTERM closes the
    pool: what is in ram is written to ssd first, for at most 30 seconds. A second Ctrl-C does not wait for that.
    A change of the file is in force within two seconds: quotas, capacities, sharing, budgets, log level. What needs a
    restart is said; a file that is wrong is said too, and changes nothing.

    \b
    Examples:
      kvpool run examples/laptop.yaml
      kvpool run pool.yaml --directory /var/lib/kvpool/chat --every 60 >> kvpool.log
      kvpool run pool.yaml --json | jq .hit_ratio
    """
    from kvpool.cli import running

    return partial(running.run, pool, directory=directory, every_s=every, as_json=json)


@app.command()
def status(
    config: Annotated[Path, typer.Option(metavar="FILE", help="A KVCachePool, as YAML or JSON.")],
    json: Json = False,
) -> Action:
    """Show every setting in force, and where it comes from.

    A value comes from the pool's own file, from one of its profiles, or from the built-in defaults.

    \b
    Examples:
      kvpool status --config examples/laptop.yaml
      kvpool status --config pool.yaml --json | jq 'select(.source != "default")'
    """
    from kvpool.cli import settings

    return partial(settings.show, config, as_json=json)


@app.command()
def quota(
    pool: Annotated[Path, typer.Argument(metavar="POOL.YAML", help="The pool's file: a KVCachePool.")],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="The model, by its name in the file.")] = None,
    assigned: Annotated[
        list[str] | None,
        typer.Argument(metavar="TIER.FIELD=SIZE...", help="ram.guaranteed=2Gi, ssd.limit=500Gi, ssd.limit=none."),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the model if the file does not have it.")] = False,
    json: Json = False,
) -> Action:
    """Show what models may use of each tier, or change it in the pool's file.

    guaranteed are bytes that no other model can take (gpu, ram, ssd), limit is the most that a model may use (every
    tier). Sizes are Kubernetes quantities; none takes a field out. Comments, order and layout of the file stay; the
    whole is checked before anything is written. A kvpool run on the file takes it within two seconds, with no restart;
    what models use is shown there. On Kubernetes the file is not the truth, the object is: change that, with kubectl
    apply or kubectl edit kvcachepool.

    \b
    Examples:
      kvpool quota pool.yaml
      kvpool quota pool.yaml llama-8b ram.guaranteed=2Gi ram.limit=8Gi ssd.limit=none
      kvpool quota pool.yaml qwen-7b ram.limit=4Gi --add
    """
    from kvpool.cli import quotas

    if model is None or not (assigned or add):
        return partial(quotas.show, pool, model, as_json=json)
    return partial(quotas.edit, pool, model, tuple(assigned or ()), add=add, as_json=json)


@app.command()
def explain(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name, as it was registered.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The prompt's token ids: a JSON list, or raw int32. - is standard input."),
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(metavar="POOL.YAML", help="The pool, by its file; or else name its directory.")
    ] = None,
    directory: Directory = None,
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Whose prompt it is.")] = "default",
    shared: Annotated[
        bool, typer.Option("--shared", help="List the shared prefixes used most, instead of explaining a prompt.")
    ] = False,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="With --shared: how many.")] = 10,
    json: Json = False,
) -> Action:
    """Say of each block of a prompt where it is, or why not; or which prefixes are shared.

    Reads what the pool left in its directory; ram is empty there, for nobody has the pool open. If somebody has, that
    process is named, and the exit code is 3: ask it with Model.explain. Named by its file, shared tiers and the catalog
    are asked too.

    \b
    Examples:
      kvpool explain --pool pool.yaml --model llama-8b --tenant acme --tokens prompt.json
      tokenize prompt.txt | kvpool explain --directory /var/lib/kvpool/chat --model llama-8b --tokens -
      kvpool explain --pool pool.yaml --shared --top 20
    """
    from kvpool.cli import explaining

    if shared:
        return partial(explaining.shared, pool, directory=directory, count=top, as_json=json)
    if model is None or tokens is None:
        raise typer.BadParameter("--model and --tokens say what to explain; --shared lists shared prefixes.")
    return partial(
        explaining.explain, pool, directory=directory, model=model, tenant=tenant, tokens=tokens, as_json=json
    )


@app.command()
def find(
    pool: Annotated[Path, typer.Argument(metavar="POOL.YAML", help="The pool, by its file; it has a database tier.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The model's name, as it was registered.")],
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Whose blocks; all tenants' otherwise.")] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="FILE", help="Blocks that begin with these token ids; - is standard input.")
    ] = None,
    similar_to: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts most like these token ids; needs Qdrant.")
    ] = None,
    older_than: Annotated[str | None, typer.Option(metavar="DURATION", help="Not used for so long: 90m, 7d.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata has this value, in JSON; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 100,
    directory: Directory = None,
    json: Json = False,
) -> Action:
    """Find blocks by what is known of them: prefix, likeness, age, metadata.

    Asks the catalog, which all processes that share it write, and the shared tiers whether they have what it says.
    Nobody may have the pool open meanwhile; if somebody has, ask that process with Pool.find.

    \b
    Examples:
      kvpool find pool.yaml --model llama-8b --older-than 7d
      kvpool find pool.yaml --model llama-8b --tenant acme --prefix prompt.json --json
      kvpool find pool.yaml --model llama-8b --tenant acme --similar-to prompt.json --limit 5
    """
    from kvpool.cli import finding

    asked = finding.Asked(model, tenant, prefix, similar_to, older_than, where or (), limit)
    return partial(finding.find, pool, asked, directory=directory, as_json=json)


@app.command()
def warm(
    pool: Annotated[Path, typer.Argument(metavar="POOL.YAML", help="A KVCachePool, or a RuntimeConfig; with ssd.")],
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPTS", help="JSON lines, or plain text. - is standard input.", show_default=False),
    ],
    directory: Directory = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_NAME", help="A transformers model on this machine. Default: SmolLM2-135M-Instruct."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the pool. Default: as it calls itself.")
    ] = None,
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Whose prompts they are.")] = "default",
    shared: Annotated[
        bool, typer.Option("--shared", help="Declare the prompts shared prefixes: evicted after all others.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Take at most so many tokens of a prompt. Default: all that fit the model."
        ),
    ] = None,
    json: Json = False,
) -> Action:
    """Fill a pool from a file of prompts, before anybody asks.

    Each prompt is run through the model as far as its whole blocks are not there yet, and they are written to ssd:
    the first request that begins with it is a hit. A line is {"prompt": "..."} or {"messages": [{"role": "system",
    "content": "..."}]}; in plain text, prompts are separated by blank lines, or else each line is one. The pool must
    not be open elsewhere: the process that has it is named then. Ctrl-C ends it; what was stored is kept.

    \b
    Examples:
      kvpool warm examples/laptop.yaml system-prompts.jsonl --shared
      kvpool warm pool.yaml manuals.txt --model ./llama-8b --tenant acme --max-tokens 4096
    """
    from kvpool.cli import warming

    asked = warming.Asked(
        pool=pool,
        prompts=prompts,
        directory=directory,
        model=model,
        name=name,
        tenant=tenant,
        shared=shared,
        max_tokens=max_tokens,
    )
    return partial(warming.warm, asked, as_json=json)


@app.command()
def replay(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...", help="Mooncake's JSON lines, plain or .gz; several are one after the other."
        ),
    ],
    capacity_blocks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Capacities to play at, in blocks: 500, 2k, 1M.")
    ] = "2k,5k,10k,20k,50k",
    policy: Annotated[str, typer.Option(metavar="NAME", help="The eviction policy, or all of them.")] = "all",
    whole_blocks: Annotated[
        bool, typer.Option("--whole-blocks", help="Leave out a prompt's last block where it is a part of one.")
    ] = False,
    json: Json = False,
) -> Action:
    """Play recorded requests through the index and its policy.

    Beside the policy stand an exact LRU, computed with a plain dictionary, and the most that any policy could reach,
    which knows the future. A line of a trace is {"input_length": 6758, "hash_ids": [0, 1, ...]}: blocks of 512 tokens.

    \b
    Examples:
      kvpool replay conversation_trace.jsonl
      kvpool replay monday.jsonl.gz tuesday.jsonl.gz --capacity-blocks 10k,100k --json
    """
    from kvpool.cli import replaying

    return partial(
        replaying.replay, traces, capacities=capacity_blocks, policy=policy, whole_blocks=whole_blocks, as_json=json
    )


@app.command()
def bench(
    area: Annotated[
        str,
        typer.Argument(
            metavar="AREA",
            help="What to measure: codecs, engine, gpu, prefetch, quality, shared, sharing, waterfall.",
        ),
    ] = "engine",
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A benchmark, or a row of one. May be given several times.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long the full pool is stored into; others take a part of it.")
    ] = 60.0,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="KVPOOL_TRACE", help="The trace to replay. Default: a made-up one."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where temporary files go: on the disk to be measured. Default: where pools lie."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: to see that it works. The figures mean nothing.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="List the benchmarks, and measure nothing.")] = False,
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as docs/benchmarks.md has it.")] = False,
) -> Action:
    """Measure this machine, each figure beside a probe.

    The probe is what the machine can do at best, measured in the same run: memcpy, raw O_DIRECT, a bare dictionary.
    Takes some five minutes, 4 GiB of memory and 4 GiB of disk, which are given back. Ends with 0 whatever is reached.

    \b
    Examples:
      kvpool bench
      kvpool bench --only match --only ssd.cold-load
      kvpool bench engine --trace conversation.jsonl.gz --json > figures.jsonl
      kvpool bench quality --only float32
    """
    from kvpool.cli import benching

    if json and markdown:
        raise typer.BadParameter("--json and --markdown exclude each other.")
    if names:
        return partial(benching.list_names, area)
    asked = benching.Asked(
        area=area,
        only=tuple(only or ()),
        seconds=seconds,
        trace=trace,
        directory=directory,
        scale=0.01 if quick else 1.0,
    )
    return partial(benching.bench, asked, json=json, markdown=markdown)


@app.command()
def version() -> Action:
    """Print the version."""
    from kvpool import __version__

    return partial(print, f"kvpool {__version__}")


def main() -> None:
    """The `kvpool` command."""
    sys.exit(ended(lambda: _run(sys.argv[1:])))


def _run(arguments: Sequence[str]) -> int:
    try:
        action = app(arguments, prog_name="kvpool", standalone_mode=False)
    except _UsageError as error:
        path = error.ctx.command_path if error.ctx else "kvpool"
        complain(f"{error.format_message()} See: {path} --help")
        return ExitCode.USAGE
    if isinstance(action, int):  # --help was printed
        return action
    action()
    return ExitCode.OK


if __name__ == "__main__":
    main()
