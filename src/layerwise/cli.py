"""The command line: reads arguments, calls the rooms below, prints. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import json as jsonlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from layerwise.errors import BadInput, LayerwiseError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Assemble, pre-train, inspect, cut, heal, merge and run neural networks layer by layer.",
)

System = Annotated[str, typer.Argument(metavar="SYSTEM_OR_FILE", help="A system's name (see 'layerwise list') or a job file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a key of the job, e.g. stages.pretrain.steps=100.")
]
ScaleOption = Annotated[
    str | None, typer.Option("--scale", help="smoke (seconds), small (minutes on two cores), full (one big GPU); some: tiny, mini.")
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with named public data sets, one folder a set.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]


@contextmanager
def _told() -> Iterator[None]:
    """Errors as one message and an exit code: 2 for bad input, 1 for a failure while running, 130 for Ctrl-C. Our warnings are notes."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_noted, warnings.showwarning)
            yield
    except BadInput as error:
        _tell(f"error: {error}")
        _end(2)
    except LayerwiseError as error:
        _tell(f"failed: {error}")
        _end(1)
    except KeyboardInterrupt:
        _tell("stopped; go on with 'layerwise resume RUN'")
        _end(130)
    except (OSError, MemoryError) as error:
        if os.environ.get("LAYERWISE_DEBUG"):
            raise
        _tell(f"failed: {type(error).__name__}: {error}")
        _end(1)
    except BaseException as error:
        # What the Rust code of a library raises when it breaks down is no Exception.
        panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panic) or isinstance(error, typer.Exit) or os.environ.get("LAYERWISE_DEBUG"):
            raise
        # A fault of ours; the last event of a run has where it happened.
        typer.echo(f"failed: {type(error).__name__}: {error}\nThis should have been told better: LAYERWISE_DEBUG=1 shows where.", err=True)
        _end(1)


def _noted(others: Callable[..., None], message: Any, category: Any, filename: str, *where: Any) -> None:
    """A warning as a person reads it, if it is ours; those of libraries as they are."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        if _leads():
            typer.echo(f"note: {message}", err=True)
    else:
        others(message, category, filename, *where)


def _tell(message: str) -> None:
    """One message on standard error, also where many processes fail together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from layerwise.train.ranks import ranks

        if not ranks().first_to_tell():
            return
    typer.echo(message, err=True)


def _end(code: int) -> NoReturn:
    """End with an exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from layerwise.train.ranks import end

        end(code)
    raise typer.Exit(code) from None


def _leads() -> bool:
    """Whether this process speaks for the job: alone, or rank 0 of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK") == "0"


@app.command("list")
def list_systems(json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the systems that come with layerwise and the verdicts of their receipts."""
    from layerwise.jobs.catalogue import listing

    with _told():
        entries = listing()
    if json:
        typer.echo(jsonlib.dumps(entries))
        return
    for e in entries:
        typer.echo(f"{e['name']:24} {e['card'] or '':4} {e['receipts'].get('small') or '-':13} {e['title']}")


@app.command()
def show(system: System, scale: ScaleOption = None, set_: Set = None) -> None:
    """Print a job as it would run: every key resolved at a scale."""
    import yaml

    with _told():
        job = _job(system, scale, set_, None, None)
        typer.echo(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


@app.command()
def run(
    system: System,
    set_: Set = None,
    scale: ScaleOption = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Comma-separated, e.g. 0,1,2.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option("--variant", help="Only these variants (the claim is left out unless both its sides run).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; new or empty. Default: runs/NAME-SCALE-N.")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Precision of all training stages: fp32 or bf16.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run a system or a job file: trains, edits, measures, and leaves a run folder with a receipt and a report."""
    with _told():
        job = _job(system, scale, set_, seeds, variant, dtype)
        folder = out if out is not None else _new_folder(f"{job.name}-{job.scale}")
        from layerwise.jobs.console import Progression
        from layerwise.jobs.run import run_job

        receipt = run_job(job, folder, data_dir=data_dir, device=device, progression=Progression(quiet=quiet))
    if _leads():
        _print_receipt(receipt, folder)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")], quiet: bool = False) -> None:
    """Go on with a run that was stopped or killed."""
    with _told():
        from layerwise.jobs.console import Progression
        from layerwise.jobs.run import resume_run

        receipt = resume_run(folder, progression=Progression(quiet=quiet))
    if _leads():
        _print_receipt(receipt, folder)


@app.command()
def estimate(
    system: System,
    set_: Set = None,
    scale: ScaleOption = None,
    gpus: Annotated[int, typer.Option("--gpus", help="How many share the job.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="h200, h100, a100, l40s or rtx4090.")] = "h200",
    mfu: Annotated[float | None, typer.Option("--mfu", help="Assumed share of the GPU's peak rate (0.35).")] = None,
    data_dir: DataDir = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a job's training stages will need: memory of each GPU, operations, time. Nothing is trained and no weight is made."""
    with _told():
        from layerwise.jobs.estimate import MFU, estimate_job, estimate_rows

        share = MFU if mfu is None else mfu
        found = estimate_job(_job(system, scale, set_, None, None), gpus=gpus, gpu=gpu, mfu=share, data_dir=data_dir)
    if json:
        typer.echo(jsonlib.dumps([e.data() for e in found]))
        return
    columns, rows = estimate_rows(found)
    _print_table(columns, rows, f"{gpus} x {gpu}, GB of each; time at {share:.0%} of the peak rate (assumed)")
    for note in dict.fromkeys(note for e in found for note in e.notes):
        typer.echo(f"note: {note}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN")], out: Annotated[Path | None, typer.Option("--out")] = None) -> None:
    """Write the HTML page of a run anew."""
    with _told():
        if not (folder / "job.yaml").is_file():
            raise BadInput(f"{folder} holds no run (there is no job.yaml in it)")
        from layerwise.report.page import write_report

        typer.echo(str(write_report(folder, out)))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder (ours or Hugging Face), a run folder or a preset.")],
    data: Annotated[str | None, typer.Option("--data", help="Text or images to run through it. Default: built-in ones.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows to run through it.")] = 64,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a row.")] = 128,
    out: Annotated[Path | None, typer.Option("--out", help="The page to write. Default: inspect.html.")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what each layer of a model is like: parameters, operations, angular distance, attention entropy, gradient norm."""
    with _told():
        from layerwise.jobs.inspection import inspect_model

        found, page = inspect_model(
            model, text=data, samples=samples, length=length, page=out or Path("inspect.html"), data_dir=data_dir, device=device
        )
    if json:
        typer.echo(jsonlib.dumps(found.data()))
    else:
        _print_table(found.tables[0].columns, found.tables[0].rows, str(model))
        typer.echo(f"page: {page}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder (ours or Hugging Face) or a run folder.")],
    target_size: Annotated[str, typer.Option("--target-size", help="Share of the model's bytes, or several: 0.5,0.25.")] = "0.5",
    target_latency: Annotated[
        float | None, typer.Option("--target-latency", metavar="MS", help="Most milliseconds, as measured here.")
    ] = None,
    latency_of: Annotated[str, typer.Option("--latency-of", help="decode (one token more) or prefill (a whole text).")] = "decode",
    latency_batch: Annotated[int, typer.Option("--latency-batch", help="Texts at a time.")] = 1,
    latency_length: Annotated[int, typer.Option("--latency-length", help="Tokens of a text.")] = 128,
    data: Annotated[str | None, typer.Option("--data", help="Text to calibrate, choose and judge on. Default: built-in English.")] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a row.")] = 128,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to choose by, and as many to judge by.")] = 256,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Rows to calibrate and measure sensitivities on.")] = 64,
    tries: Annotated[int, typer.Option("--tries", min=1, help="Candidates of each method that are made and measured.")] = 6,
    group: Annotated[int, typer.Option("--group", min=1, help="Weights that share a scale when they are quantized.")] = 128,
    heal: Annotated[int, typer.Option("--heal", min=0, help="Train the best of every method for so many steps before rounding.")] = 0,
    heal_lr: Annotated[float, typer.Option("--heal-lr", min=0, help="Highest learning rate of that.")] = 5e-4,
    seed: int = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the plan; new or empty.")] = Path("plan"),
    apply: Annotated[Path | None, typer.Option("--apply", help="Also write the model of the first size's plan here.")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Find what makes a model so small at the least loss: layers dropped, widths cut, factors, bits, layer by layer; as a job to run."""
    with _told():
        from layerwise.jobs.planning import compared, layer_rows, plan_data, plan_model, plan_rows
        from layerwise.plan.choice import How
        from layerwise.plan.latency import Work

        found = plan_model(
            model, targets=_shares(target_size), out=out, target_ms=target_latency,
            work=Work(latency_of, latency_batch, latency_length), text=data, length=length, rows=rows, tries=tries,  # type: ignore[arg-type]
            how=How(group=group, samples=samples), heal=heal, heal_lr=heal_lr, seed=seed, apply=apply, data_dir=data_dir, device=device,
            say=(lambda message: None) if quiet or json else partial(typer.echo, err=True),
        )  # fmt: skip
    if json:
        typer.echo(jsonlib.dumps(plan_data(found)))
        return
    for best in found.found:
        _print_table(*layer_rows(best), f"The plan for {best.target:g} of the bytes")
        _print_table(*plan_rows(found, best), f"{model} at {best.target:g} of its bytes")
        typer.echo(compared(best)["sentence"])
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"page: {out / 'plan.html'}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder with a tokenizer.")],
    prompt: Annotated[str, typer.Argument()],
    new: Annotated[int, typer.Option("--new", min=1)] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1)] = 1.0,
    path: Annotated[str | None, typer.Option("--path", help="Layers to run, in order, e.g. 0,1,1,3.")] = None,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Continue a text."""
    with _told():
        from layerwise.jobs.inspection import continue_text

        layers = _numbers(path, "--path") if path else None
        typer.echo(continue_text(model, prompt, new=new, temperature=temperature, top_p=top_p, path=layers, seed=seed, device=device))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM")],
    target: Annotated[Path, typer.Argument(metavar="TO")],
    to: Annotated[str, typer.Option("--to", help="hf, gptq or layerwise.")] = "hf",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Turn a checkpoint into another format: ours into Hugging Face's, Hugging Face's into ours."""
    with _told():
        from layerwise.jobs.inspection import convert_checkpoint

        typer.echo(str(convert_checkpoint(source, target, to=to, dtype=dtype)))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    scale: Annotated[str, typer.Option("--scale")] = "small",
    rerun: Annotated[Path | None, typer.Option("--rerun", help="Also run it again, into this new folder, and compare.")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Re-check a committed receipt: does its verdict follow from its values, and (--rerun) do the values come again?"""
    with _told():
        from layerwise.jobs.verify import verify as check

        result = check(name, scale, rerun=rerun, data_dir=data_dir, device=device)  # type: ignore[arg-type]
    typer.echo(
        jsonlib.dumps(result) if json else f"{name} ({scale}): {result['verdict']}, {'consistent' if result['ok'] else 'NOT consistent'}"
    )
    if not json:
        for problem in result["problems"]:
            typer.echo(f"  {problem}")
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what this machine has: devices, threads, versions, cache, optional parts."""
    with _told():
        from layerwise.jobs.inspection import diagnosis

        for name, value in diagnosis().items():
            typer.echo(f"{name:16} {value}")


def _job(
    system: str, scale: str | None, set_: list[str] | None, seeds: str | None, variants: list[str] | None, dtype: str | None = None
) -> Any:
    """The job that the options of `run` and `show` describe."""
    from layerwise.jobs.catalogue import find
    from layerwise.jobs.merge import setting
    from layerwise.jobs.schema import read_job
    from layerwise.table import unknown

    settings = dict(setting(text) for text in set_ or [])
    if seeds is not None:
        settings["seeds"] = _numbers(seeds, "--seeds")
    job = read_job(find(system), scale=scale, settings=settings)  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    if dtype is not None:
        if dtype not in ("fp32", "bf16"):
            raise BadInput(f"--dtype is fp32 or bf16; got '{dtype}'")
        changes |= {f"stages.{name}.precision": dtype for name, stage in job.stages.items() if "train" in stage}
    if variants:
        for name in variants:
            if name not in job.variants:
                raise unknown(name, job.variants, "variant")
        changes["variants"] = None
        whole = job.claim is not None and {job.claim.method, job.claim.baseline} <= set(variants)
        changes |= {} if whole else {"claim": None}
    if changes:
        data = job.model_dump(mode="json")
        if variants:
            data["variants"] = {name: job.variants[name] for name in variants}
            changes.pop("variants")
        job = read_job(data, settings=changes)
    return job


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option} takes numbers with commas between them, like 0,1,2; got '{text}'") from None


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"--target-size takes a share, or several with commas between them, like 0.5,0.25; got '{text}'") from None


def _new_folder(stem: str) -> Path:
    root = Path("runs")
    taken: Callable[[int], bool] = lambda n: (root / f"{stem}-{n}").exists()  # noqa: E731
    return root / f"{stem}-{next(n for n in range(1, 10**6) if not taken(n))}"


def _print_receipt(receipt: Any, folder: Path) -> None:
    from layerwise.jobs.inspection import receipt_rows

    columns, rows = receipt_rows(receipt)
    _print_table(columns, rows, receipt.claim.text if receipt.claim else receipt.system)
    if receipt.difference is not None:
        interval = receipt.difference.ci95
        typer.echo(f"difference {receipt.difference.mean:+.4g}" + (f"  95 % [{interval[0]:+.4g}, {interval[1]:+.4g}]" if interval else ""))
    if receipt.verdict is not None:
        typer.echo(f"verdict: {receipt.verdict}")
    typer.echo(f"report: {folder / 'report.html'}")


def _print_table(columns: list[str], rows: list[list[Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(
            *("" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row)
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
