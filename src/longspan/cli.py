"""list · show · check · compare · bench · train · generate · evaluate · convert.

Exit codes: 0 done, 1 failed (a law, every row), 2 bad usage. torch is imported by the commands
that need it, when they run.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import longspan
from longspan.bench.settings import MIXING, Settings, Spec, choose
from longspan.card import Card
from longspan.errors import LongspanError

if TYPE_CHECKING:
    from longspan.bench.compare import Progress
    from longspan.bench.speed import Cost


class _Commands(TyperGroup):
    """Prints a user's mistake as one message; any other exception keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LongspanError as error:
            typer.echo(f"longspan: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Every published way past the quadratic attention bottleneck: list them, check them, "
    "and compare them on your data, at your length, on your machine.",
)
DEFAULT = Settings()


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


def _console(*, err: bool = False) -> Console:
    """The terminal's width; in a pipe nothing is wrapped or coloured."""
    console = Console(stderr=err, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=err, highlight=False, width=10_000, no_color=True)
    return console


def _print(*parts: Any) -> None:
    console = _console()
    for part in parts:
        if console.is_terminal:
            console.print(part)
            continue
        with console.capture() as capture:
            console.print(part)
        typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, ensure_ascii=False, indent=2, default=str))


def _table(*headers: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"longspan {longspan.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


@app.command(
    "list",
    epilog=_examples(
        "longspan list", "longspan list --family kernel --mode causal", "longspan list --json"
    ),
)
def list_(
    family: Annotated[str | None, typer.Option(help="kernel, low-rank, sparse-pattern, …")] = None,
    kind: Annotated[str | None, typer.Option(help="attention, mixer, position, …")] = None,
    mode: Annotated[str | None, typer.Option(help="bidirectional, causal, cross or step.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the mechanisms: what they are, the forms they have, what they cost."""
    found = longspan.find(family=family, kind=kind, mode=mode)
    if as_json:
        _print_json([card.as_dict() for card in found])
        return
    table = _table("id", "kind", "family", "modes", "time", "state", "cite")
    for card in found:
        modes = " ".join(sorted(card.modes))
        row = (card.id, card.kind, card.family, modes, card.time, card.memory, card.cite)
        table.add_row(*map(Text, row))
    _print(table)


@app.command(epilog=_examples("longspan show longformer", "longspan show s4 --json"))
def show(
    id: Annotated[str, typer.Argument(help="A mechanism's id; longspan list prints them.")],
    as_json: AsJson = False,
) -> None:
    """Show one mechanism: its card, its arguments and their meaning."""
    import inspect

    from longspan.registry import builder, options

    card, built = longspan.show(id), builder(id)
    what = inspect.getdoc(built) or ""
    arguments = [
        {
            "name": name,
            "type": inspect.formatannotation(p.annotation).replace("typing.", ""),
            "required": p.default is p.empty,
            "default": None if p.default is p.empty else p.default,
        }
        for name, p in options(id).items()
    ]
    if as_json:
        _print_json({**card.as_dict(), "arguments": arguments, "doc": what})
        return
    facts = _table("", "", right=())
    facts.show_header = False
    for name, value in _facts(card):
        facts.add_row(Text(name, style="bold"), Text(value))
    table = _table("argument", "default", "type")
    for argument in arguments:
        default = "(required)" if argument["required"] else repr(argument["default"])
        table.add_row(*map(Text, (argument["name"], default, argument["type"])))
    _print(Text(card.id, style="bold"), Text(card.what), "", facts, "")
    _print(*([table, ""] if arguments else []), Text(what))


def _facts(card: Card) -> list[tuple[str, str]]:
    facts = [
        ("name", card.name),
        ("kind", f"{card.kind}, {card.family}"),
        ("paper", f"{card.paper} ({card.cite})"),
        ("link", card.link),
        ("modes", ", ".join(sorted(card.modes))),
        ("causality", card.causality),
        ("time", card.time),
        ("state", card.memory),
    ]
    if card.exact is not None:
        given = ", ".join(f"{name}={value!r}" for name, value in card.exact.items())
        facts.append(("is softmax at", given or "any arguments"))
    return facts


@app.command(
    epilog=_examples("longspan check linear-transformer", "longspan check longformer s4 --json")
)
def check(
    ids: Annotated[list[str], typer.Argument(help="Mechanisms' ids.")],
    as_json: AsJson = False,
) -> None:
    """Check the laws of mechanisms: right, causal, streaming as whole. Exit code 1 if one fails.

    JSON is one object a mechanism, one a line.
    """
    for id in ids:
        longspan.show(id)
    from longspan.testing import certificate

    failed = False
    for id in ids:
        verdicts = certificate(id)
        failed |= any(verdict.result == "fail" for verdict in verdicts)
        if as_json:
            typer.echo(
                json.dumps({"id": id, "laws": [asdict(v) for v in verdicts]}, ensure_ascii=False)
            )
            continue
        table = _table(id, "", "")
        styles = {"pass": "green", "fail": "bold red", "skip": "yellow"}
        for v in verdicts:
            table.add_row(
                Text(v.law.replace("_", " ")),
                Text(v.result, style=styles[v.result]),
                Text(v.reason or ""),
            )
        passed = sum(v.result == "pass" for v in verdicts)
        _print(table, f"{passed} of {len(verdicts)} laws hold.", "")
    if failed:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "longspan compare --length 2048 --budget 40s",
        "longspan compare --data book.txt --mechanisms multi-head-attention,s4 --seeds 3",
        "longspan compare --mechanisms 'multi-head-attention,longformer(window=128)'",
        "longspan compare --mechanisms core,family:kernel --budget 5m",
    )
)
def compare(
    data: Annotated[str, typer.Option(help="A corpus's name, or a path.")] = DEFAULT.data,
    mechanisms: Annotated[
        str,
        typer.Option(
            help="Ids separated by commas, each with (name=value, …) if need be; family:NAME; "
            "core (one of each approach); all."
        ),
    ] = "core",
    length: Annotated[int, typer.Option(help="Tokens (bytes) of a window.")] = DEFAULT.length,
    match: Annotated[
        str, typer.Option(help="What is made equal to dense: params, flops, state or time.")
    ] = DEFAULT.match,
    budget: Annotated[
        str, typer.Option(help="Of training, a row: 30s, 2m, 1h or 200000tok.")
    ] = DEFAULT.budget,
    seeds: Annotated[int, typer.Option(min=1, help="Rows a mechanism.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the records and the report.")] = Path(
        "runs/compare"
    ),
    width: Annotated[int, typer.Option(help="Of the model.")] = DEFAULT.width,
    layers: Annotated[int, typer.Option(help="Of the model.")] = DEFAULT.layers,
    heads: Annotated[int, typer.Option(help="A layer.")] = DEFAULT.heads,
    batch: Annotated[
        int | None, typer.Option(help="Windows a step; by default 4096 tokens' worth.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULT.device,
    certificate: Annotated[bool, typer.Option(help="Check the laws, too.")] = True,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Train also what can see the future.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Measure failed rows again.")] = False,
) -> None:
    """Train the same decoder with each mechanism, measure it, and recommend one.

    Every row is a process of its own. Interrupted, the same command goes on from there.
    """
    settings = Settings(
        data=data,
        length=length,
        match=match,
        budget=budget,
        width=width,
        layers=layers,
        heads=heads,
        batch=batch,
        device=device,
        certificate=certificate,
        allow_leaks=allow_leaks,
    )
    chosen = choose(mechanisms)
    from longspan import report
    from longspan.bench.compare import run

    try:
        with _Watch() as watch:
            rows = run(settings, chosen, out, seeds=seeds, retry=retry, watch=watch)
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted. Finished rows are kept in {out}; the same command goes on from there.",
            err=True,
        )
        raise typer.Exit(130) from None
    page = report.write(rows, out / "report.html")
    advice = report.recommend(rows)
    _print(report.table(rows), "", Text(advice.text, style="bold"))
    for title, lines in (("Because", advice.reasons), ("But", advice.doubts)):
        if lines:
            _print("", title, *(Text(f"  · {line}") for line in lines))
    _print("", f"Report: {page}")
    if not any(row["status"] == "done" for row in rows):
        raise typer.Exit(1)


class _Watch:
    """A progress bar on stderr; in a pipe, a line a row."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = _console(err=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=1.0)
        self.row = -1

    def __enter__(self) -> "_Watch":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, at: "Progress") -> None:
        if at.row == at.rows:
            return
        name = f"{at.row + 1}/{at.rows} {at.label}"
        if self.bar.disable and at.row != self.row:
            typer.echo(name, err=True)
        self.row = at.row
        share = at.done if at.phase == "training" else 0.0
        self.bar.update(
            self.task,
            description=f"{name}: {at.phase}",
            completed=share if at.phase in ("training", "starting") else None,
        )


@app.command(
    epilog=_examples(
        "longspan bench --mechanisms linear-transformer,longformer",
        "longspan bench --mechanisms family:kernel --lengths 1024,16384,65536 --json",
    )
)
def bench(
    mechanisms: Annotated[
        str,
        typer.Option(
            help="Ids separated by commas, each with (name=value, …) if need be; family:NAME; all."
        ),
    ] = "all",
    lengths: Annotated[str, typer.Option(help="Separated by commas.")] = "1024,4096,16384",
    threads: Annotated[int, typer.Option(min=1, help="With one, CPU time is measured.")] = 1,
    seconds: Annotated[float, typer.Option(help="Spent on each pair of runs.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure the cost of bare mechanisms (B 1, H 4, D 64) beside dense attention.

    Below 1, a ratio is faster than dense attention. FLOPs are of the forward pass, memory is the
    most that tensors of forward and backward hold at one time. Roof is the least time that the
    FLOPs need, at the rate a large matrix product reaches here (or the bytes, at a large copy's),
    over the time taken.
    """
    sizes = _lengths(lengths)
    if dtype not in ("float32", "bfloat16"):
        raise LongspanError(f"--dtype is '{dtype}'; expected float32 or bfloat16.")
    chosen = choose(mechanisms)
    import time

    import torch

    from longspan.bench import speed

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    kind = getattr(torch, dtype)
    best = speed.ceilings(kind, clock=clock)
    costs: list[Cost] = []
    failures: list[dict[str, str]] = []
    for spec in chosen:
        if not as_json:
            typer.echo(spec.id, err=True)
        try:
            costs += speed.measure(
                spec, lengths=sizes, seconds=seconds, dtype=kind, best=best, clock=clock
            )
        except (LongspanError, RuntimeError) as error:
            failures.append({"id": spec.id, "reason": str(error)})
    if as_json:
        _print_json([*map(asdict, costs), *failures])
    else:
        _print(_costs(costs))
        for failure in failures:
            typer.echo(f"{failure['id']}: {failure['reason']}", err=True)
    if failures:
        raise typer.Exit(1)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise LongspanError(
            f"--lengths is '{text}'; expected whole numbers separated by commas, as in 1024,4096."
        )
    return lengths


def _costs(costs: list["Cost"]) -> Table:
    headers = (
        *("length", "forward ms", "× dense", "roof", "training ms", "× dense ", "roof "),
        *("GFLOP", "MiB", "× dense  ", "L^", "MiB L^"),
    )
    table = _table("id", *headers, right=headers)

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    for cost in costs:
        table.add_row(
            Text(cost.id),
            f"{cost.length:,}",
            f"{cost.forward * 1e3:.2f}",
            number(cost.forward_ratio, 3),
            f"{cost.roofline:.2f}",
            f"{cost.training * 1e3:.2f}",
            number(cost.training_ratio, 3),
            f"{cost.training_roofline:.2f}",
            f"{cost.flops / 1e9:.2f}",
            f"{cost.memory / 2**20:.1f}",
            number(cost.memory_ratio, 2),
            number(cost.exponent, 2),
            number(cost.memory_exponent, 2),
        )
    return table


@app.command(
    epilog=_examples(
        "longspan train --mixers linear-transformer --out runs/lm --steps 200",
        "longspan train --data book.txt --mixers 's4,s4,longformer(window=64)' --out runs/book",
        "longspan train --mixers linear-transformer --out runs/lm --steps 400 --resume",
    )
)
def train(
    out: Annotated[Path, typer.Option(help="Folder of the model and its checkpoints.")],
    data: Annotated[str, typer.Option(help="A corpus's name, or a path.")] = "stdlib",
    mixers: Annotated[
        str, typer.Option(help="Ids separated by commas, tiled over the layers.")
    ] = "multi-head-attention",
    length: Annotated[int, typer.Option(help="Tokens (bytes) of a window.")] = 512,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = 1e-3,
    width: Annotated[int, typer.Option(help="Of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 4,
    heads: Annotated[int, typer.Option(help="A layer.")] = 4,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; by default a tenth of them.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT, if any.")
    ] = False,
) -> None:
    """Train a byte-level language model, to be loaded by `generate` or by transformers."""
    specs = _specs(mixers)
    import math

    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    from longspan.data import corpus
    from longspan.models import LongspanConfig
    from longspan.training import language_model

    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if last is not None and not resume:
        raise LongspanError(
            f"{out} holds a checkpoint already: add --resume to go on from it, or choose another "
            "--out."
        )
    config = LongspanConfig(
        mixers=[{"id": spec.id, **spec.arguments} for spec in specs],
        width=width,
        layers=layers,
        heads=heads,
        length=length,
    )
    if last is not None:
        _same_model(config, LongspanConfig.from_pretrained(last), out)
    stream = corpus(data)
    trainer = language_model(
        stream.train,
        config=config,
        out=out,
        valid=stream.valid[: 128 * length],
        length=length,
        batch=batch,
        steps=steps,
        lr=lr,
        warmup=max(1, steps // 20),
        save_every=save_every or max(1, steps // 10),
        log_every=max(1, steps // 20),
        seed=seed,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_reporter(steps))
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    typer.echo(f"{loss / math.log(2):.3f} bits per byte held out. Model: {out}")


def _specs(mixers: str) -> list[Spec]:
    """The mixers in the order given, repeats kept: they are layers."""
    import re

    specs = [Spec.parse(part) for part in re.split(r",(?![^(]*\))", mixers)]
    for spec in specs:
        if longspan.show(spec.id).kind not in MIXING:
            raise LongspanError(
                f"'{spec.id}' is of kind {longspan.show(spec.id).kind} and mixes no sequence: "
                f"give mechanisms of the kinds {', '.join(MIXING)}."
            )
    return specs


def _same_model(wanted: Any, saved: Any, out: Path) -> None:
    for name in ("mixers", "width", "layers", "heads", "length"):
        now, then = getattr(wanted, name), getattr(saved, name)
        if now != then:
            raise LongspanError(
                f"the checkpoint in {out} was trained with {name}={then} and this run asks for "
                f"{now}: give the same, or choose another --out."
            )


def _reporter(steps: int) -> Any:
    """Prints the step and the loss in bits a byte, on stderr."""
    import math

    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, float] | None = None,
            **_: Any,
        ) -> None:
            if logs and "loss" in logs:
                bits = logs["loss"] / math.log(2)
                print(f"{state.global_step}/{steps}: {bits:.3f} bits per byte", file=sys.stderr)

    return Reporter()


@app.command(
    epilog=_examples(
        "longspan generate runs/lm --prompt 'def main(' --tokens 200 --temperature 0.8"
    )
)
def generate(
    folder: Annotated[Path, typer.Argument(help="A byte-level model, as `train` saves it.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="Bytes to add.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 1.0,
    seed: Seed = 0,
) -> None:
    """Continue a text."""
    if not prompt:
        raise LongspanError("the prompt is empty: give at least one character.")
    if not (folder / "config.json").is_file():
        raise LongspanError(
            f"{folder} holds no model (no config.json): give the folder that `longspan train "
            "--out` wrote."
        )
    import torch

    from longspan.models import LongspanForCausalLM

    model = LongspanForCausalLM.from_pretrained(folder).eval()
    if model.config.vocab_size != 256:
        raise LongspanError(
            f"the model in {folder} has {model.config.vocab_size} tokens, and generate speaks "
            "bytes (256): load it with transformers and its own tokenizer."
        )
    given = torch.tensor([list(prompt.encode())])
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    made = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        **(sampling or {"do_sample": False}),
    )
    typer.echo(bytes(made[0].tolist()).decode(errors="replace"))


@app.command(
    epilog=_examples(
        "longspan evaluate runs/lm --tasks needle-single,frequent-words --lengths 1024,2048",
        "longspan evaluate runs/lm --tasks needle --lengths 4096 --max-length 4096 --json",
    )
)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model, as `train` or transformers saves it.")],
    tasks: Annotated[
        str, typer.Option(help="RULER's, separated by commas; needle for all that begin so; all.")
    ] = "all",
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "1024",
    samples: Annotated[int, typer.Option(min=1, help="Of each task at each length.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(help="Go beyond the length that the model states, up to this.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULT.device,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score a language model on RULER's generated tasks: how much of the answers it gives."""
    sizes = _lengths(lengths)
    import logging

    from longspan.bench import lm_eval

    # It warns of what was meant: a model given as an instance, tasks of our own.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    scores = lm_eval.scores(
        lm_eval.evaluate(
            *lm_eval.load(folder, device=device),
            tasks=[task.strip() for task in tasks.split(",")],
            lengths=sizes,
            samples=samples,
            batch=batch,
            max_length=max_length,
            seed=seed,
        )
    )
    if as_json:
        _print_json(scores)
        return
    headers = [f"{size:,}" for size in sizes]
    table = _table("% of the answers", *headers, right=tuple(headers))
    for task, given in scores.items():
        table.add_row(Text(task), *(f"{100 * given[size]:.1f}" for size in sizes))
    _print(table)


@app.command(
    epilog=_examples(
        "longspan convert smollm2 --to 'longformer(window=256, hubs=0)' --out runs/local",
        "longspan convert smollm2 --to performer --layers 0,1,-1 --out runs/mixed --json",
    )
)
def convert(
    folder: Annotated[Path, typer.Argument(help="A language model, as transformers saves it.")],
    to: Annotated[str, typer.Option(help="An id, with (name=value, …) if need be.")],
    out: Annotated[Path, typer.Option(help="Folder of the converted model.")],
    layers: Annotated[str, typer.Option(help="all, or numbers separated by commas.")] = "all",
    data: Annotated[str, typer.Option(help="Text for the health: a name, or a path.")] = "stdlib",
    lengths: Annotated[str, typer.Option(help="Of the health, separated by commas.")] = "128,512",
    health: Annotated[bool, typer.Option(help="Measure what the swap did.")] = True,
    as_json: AsJson = False,
) -> None:
    """Put another mechanism into a pretrained model, keeping its weights; measure what that did."""
    from longspan.convert import command

    done = command.convert(
        folder,
        to,
        out,
        layers="all" if layers == "all" else _whole("--layers", layers),
        data=data,
        lengths=_lengths(lengths) if health else (),
    )
    if done is not None:
        _print_json(done.as_dict()) if as_json else _print(done)
    typer.echo(f"Model: {out} (longspan.convert.load)", err=as_json)


def _whole(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LongspanError(
            f"{option} is '{text}'; expected whole numbers separated by commas, as in 0,1,-1."
        ) from None


def main() -> None:
    """The `longspan` command."""
    app()
