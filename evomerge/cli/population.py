"""Populations: who lives in a run of the optimizer niches; files to begin other runs from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evomerge.cli.options import JsonOption, StoreOption, open_store

RunArgument = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]


class _ShowByDefault(TyperGroup):
    """Takes `population RUN` for `population show RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="population",
    cls=_ShowByDefault,
    help="Show, export or import who lives in a run with niches.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def show(run: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show who lives: scores, what each alone solves, niches, parents, segments."""
    from evomerge.cli.display import console, print_json, simple_table
    from evomerge.report.population import Population

    with open_store(store) as opened:
        data = Population(opened.run(run)).to_json()
    if as_json:
        print_json(data)
        return
    rows = []
    for one in data["individuals"]:
        task, share = max(one["niche"].items(), key=lambda item: item[1])
        mixed = "  ".join(f"{name} {part:.2f}" for name, part in one["ancestry"].items())
        rows.append(
            (
                one["candidate"],
                f"{one['score']:.3f}",
                f"{100 * one['fitness_share']:.1f} %",
                one["documents_alone"],
                f"{task} {100 * share:.0f} %",
                " x ".join(map(str, one["parents"])) or "founder",
                one["depth"],
                one["segments"] or "-",
                mixed or "-",
            )
        )
    columns = ("candidate", "score", "fitness", "alone", "niche", "parents", "depth", "segments", "mix")
    console.print(simple_table(columns, rows))
    console.print(
        f"{len(rows)} live; together they solve {100 * data['coverage']:.1f} % of {data['documents']} "
        f"documents; entropy {data['entropy']:.2f} bits"
    )


@app.command("export")
def export_population(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="The population file to write.", show_default=False)],
    models: Annotated[
        Path | None, typer.Option("--models", help="Also write models that complement each other into here.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many models.")] = 3,
    store: StoreOption = None,
) -> None:
    """Write who lives as a file that another run can begin from."""
    from evomerge.errors import UserError
    from evomerge.report.population import Population

    if out.exists():
        raise UserError(f"{out}: it exists; choose another name")
    with open_store(store) as opened:
        view = opened.run(run)
        found = Population(view)
        chosen = found.complementary(count) if models else []
        targets = {
            one.candidate.number: (models or Path()) / f"model-{one.candidate.number}" for one in chosen
        }
        taken = next((target for target in targets.values() if target.exists()), None)
        if taken is not None:
            raise UserError(f"{taken}: it exists; choose another folder")
        file = found.to_file()
        file.write(out)
        typer.echo(f"wrote {out}: {len(file.individuals)} individuals")
        if targets:
            from evomerge.checkpoints.whole import made_folder
            from evomerge.report.export import export_candidate

            for number, target in targets.items():
                with made_folder(target.parent):
                    typer.echo(f"wrote {export_candidate(view, target, number)}")


@app.command("import")
def import_population(
    population: Annotated[Path, typer.Argument(help="A population file.", show_default=False)],
    config: Annotated[Path, typer.Argument(help="The config of the run to begin.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The population file to write.", show_default=False)],
    mapped: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="THEIRS=OURS", help="Put a source in the place of one that differs."),
    ] = None,
) -> None:
    """Check a population against a config's sources, and write it over these."""
    from evomerge.config import read_config
    from evomerge.errors import UserError
    from evomerge.plan import Plan
    from evomerge.population import founders, read_population

    if out.exists():
        raise UserError(f"{out}: it exists; choose another name")
    renamed = {}
    for text in mapped or []:
        theirs, equals, ours = text.partition("=")
        if not equals:
            raise UserError(f"--map {text}: expected THEIRS=OURS")
        renamed[theirs] = ours
    optimizer = read_config(config).optimizer.name
    if optimizer != "niches":
        raise UserError(
            f"{config}: optimizer.name: expected niches, which alone takes founders, got {optimizer}"
        )
    parsed = read_config(config, ["optimizer.founders=null"])
    plan = Plan(parsed, config.parent.resolve())
    known = read_population(population)
    sources = [plan.refs[ref.name] for ref in parsed.sources.models]
    genomes = founders(known, plan.space, sources, renamed)
    members = [
        member.model_copy(update={"genome": genome})
        for member, genome in zip(known.individuals, genomes, strict=True)
    ]
    known.model_copy(update={"sources": tuple(sources), "individuals": tuple(members)}).write(out)
    new = [ref.name for ref in sources if ref.identity not in {r.identity for r in known.sources}]
    mine = set(renamed.values())
    for name in new:
        place = "in the place of another" if name in mine else "with coefficient 0 in all"
        typer.echo(f"{name} is new: {place}")
    typer.echo(f"wrote {out}: {len(members)} individuals; begin from it with optimizer.founders")
