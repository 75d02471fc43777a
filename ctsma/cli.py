"""The command line: run, status, simulate, import, check-data, predict, export-model, report. Exit codes: 0 good,
1 found faults or a stage failed, 2 the user's input cannot be used, 130 stopped by the user."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import __version__
from .cohort import InputFault

STUDY_FAILED, BAD_INPUT, STOPPED = 1, 2, 130
SHIPPED = Path(__file__).parents[1] / "models" / "quick"  # trained by the quick study


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never shows a traceback for a fault of the input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except InputFault as fault:
        print(fault, file=sys.stderr)
        return BAD_INPUT
    except OSError as error:  # a full disk, a folder without permission: what is written is whole or absent
        where = error.filename or "disk"
        print(f"{where}: {error.strerror or error}; mend it, the command goes on where it stopped.", file=sys.stderr)
        return STUDY_FAILED
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ctsma", description="Trabecular biomarkers from knee CT, learned from MR.")
    parser.add_argument("--version", action="version", version=f"ctsma {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="run the study's notebooks in order, resuming what is done"))
    status = commands.add_parser("status", help="which stages of a run are done")
    status.add_argument("--name", default="quick", help="folder below runs/")
    status.set_defaults(command=_status)
    _add_simulate(commands.add_parser("simulate", help="write a simulated cohort to disk"))
    _add_import(commands.add_parser("import", help="make a cohort without identities of a DICOM export"))
    _add_check_data(commands.add_parser("check-data", help="every fault of every knee of a manifest"))
    _add_predict(commands.add_parser("predict", help="estimate the biomarkers of knees from their CT alone"))
    _add_export(commands.add_parser("export-model", help="write a run's networks as a model directory for predict"))
    report = commands.add_parser("report", help="write a run's HTML report again")
    report.add_argument("--name", default="quick", help="folder below runs/")
    report.add_argument("--readme", help="also renew the results table of this README")
    report.set_defaults(command=_report)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="quick", help="tiny, quick or paper (default: quick)")
    parser.add_argument("--name", help="folder below runs/ (default: the profile's name)")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage again, and all after it")
    parser.add_argument("--manifest", help="your own cohort instead of the simulated one")
    parser.add_argument("--root", help="folder the manifest's paths are relative to (default: the manifest's)")
    parser.add_argument("--anatomy", help="label map to grow the simulated knees from")
    parser.add_argument("--seed", type=int, help="seed of cohort, folds and networks (default: 0)")
    parser.add_argument("--jobs", type=int, dest="n_jobs", help="processes, one thread each (default: 2)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any notebook parameter")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, with time and disk, and stop")
    parser.set_defaults(command=_run)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder of the new cohort")
    parser.add_argument("--knees", type=int, default=80)
    parser.add_argument("--rescans", type=int, default=0, help="knees with a second MR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--anatomy", help="label map to grow the knees from")
    parser.add_argument("--jobs", type=int, default=2)
    parser.set_defaults(command=_simulate)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="tree of mixed DICOM files")
    parser.add_argument("--out", required=True, help="folder of the cohort, made or extended")
    parser.add_argument("--choice", help="CSV that overrides the choice of series (default: OUT-choice.csv)")
    parser.add_argument("--choose", action="store_true", help="write that CSV, to be edited, and stop")
    parser.add_argument("--side", choices=["L", "R"], help="of the series that do not say it")
    parser.add_argument("--echo", type=int, help="of multi-echo MR (default: the shortest)")
    parser.add_argument("--site", default="", help="for the manifest's column site")
    parser.add_argument("--salt-file", help="secret of the pseudonyms, made if absent (default: OUT.salt)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.set_defaults(command=_import)


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="CSV of knees; columns: data_manifest/datapackage.json")
    parser.add_argument("--root", help="folder the image paths are relative to (default: the manifest's)")
    parser.add_argument("--quick", action="store_true", help="read the images only: no bones, no registration")
    parser.add_argument("--out", help="also write the table to this CSV")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.set_defaults(command=_check_data)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ct", nargs="*", metavar="CT[:L|:R]", help="NIfTI file or DICOM folder, with its side")
    parser.add_argument("--side", choices=["L", "R"], help="side of the CTs that name none")
    parser.add_argument("--manifest", help="predict every CT of this manifest instead")
    parser.add_argument("--root", help="folder the manifest's paths are relative to (default: the manifest's)")
    parser.add_argument("--model", default=str(SHIPPED), help="model directory (default: the one that comes along)")
    parser.add_argument("--out", required=True, help="folder of the results, one folder a CT")
    parser.add_argument("--jobs", type=int, default=2, help="CTs at a time, one thread each (default: 2)")
    parser.set_defaults(command=_predict)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="quick", help="finished run below runs/")
    parser.add_argument("--out", required=True, help="model directory to write; an older one there is replaced")
    parser.add_argument("--arm", default="ct_sma_plus", help="which networks (default: ct_sma_plus)")
    parser.add_argument("--seed", type=int, default=0, help="of which seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that measure the training CTs (default: 2)")
    parser.set_defaults(command=_export)


def _run(arguments: argparse.Namespace) -> int:
    from . import report, study

    path = _run_folder(arguments.name or arguments.profile)
    if arguments.dry_run:
        _say_plan(study.plan(path, arguments.profile, _overrides(arguments), arguments.start), arguments.profile)
        return 0
    with _Screen() as say:
        try:
            study.run(path, arguments.profile, _overrides(arguments), arguments.start, say)
        except study.StageFailed as failure:
            print(failure, file=sys.stderr)
            return STUDY_FAILED
        say(f"report: {report.write_report(path)}")
    return 0


def _run_folder(name: str) -> Path:
    if Path(name).name != name or name in ("", "."):
        raise InputFault(f"--name {name}", "is not the name of one folder below runs/", "give a name without / and ..")
    return Path("runs") / name


def _overrides(arguments: argparse.Namespace) -> dict:
    given = {}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputFault(f"--set {pair}", "has no value", "write --set NAME=VALUE")
        given[name] = value
    for name in ("seed", "n_jobs"):
        given |= {name: getattr(arguments, name)} if getattr(arguments, name) is not None else {}
    for name in ("manifest", "root", "anatomy"):
        given |= {name: str(Path(getattr(arguments, name)).resolve())} if getattr(arguments, name) else {}
    return given


def _say_plan(steps: list[dict], profile: str) -> None:
    from .study import profiles

    minutes, disk_gb = profiles()[profile]["minutes"], profiles()[profile]["disk_gb"]
    for step in steps:
        estimate = f"about {minutes[step['stage']]:g} min" if step["state"] == "run" else ""
        print(f"{step['stage']:28}{step['state']:6}{estimate}")
    total = sum(minutes[step["stage"]] for step in steps if step["state"] == "run")
    print(f"in all about {total:g} minutes on two cores, {disk_gb:g} GB on disk")


def _status(arguments: argparse.Namespace) -> int:
    from .study import status

    for row in status(_run_folder(arguments.name)):
        seconds = f"{row['seconds']:.0f} s" if row["seconds"] else ""
        print(f"{row['stage']:28}{row['state']:16}{seconds:>8}  {row['finished'] or ''}")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from .simulation import write_cohort

    with _Screen() as say:
        options = {"n_rescan": arguments.rescans, "anatomy": arguments.anatomy, "n_jobs": arguments.jobs, "report": say}
        print(write_cohort(arguments.out, "simulated", arguments.knees, arguments.seed, **options))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from .intake import choose, import_dicom

    given = {"salt_file": arguments.salt_file or f"{arguments.out}.salt", "side": arguments.side}
    given |= {"choice_file": arguments.choice or f"{arguments.out}-choice.csv", "echo": arguments.echo}
    with _Screen() as say:
        if arguments.choose:
            done = choose(arguments.folder, arguments.out, **given)
            say(f"choice: {given['choice_file']} (edit take and side, then the same command without --choose)")
        else:
            given |= {"site": arguments.site, "n_jobs": arguments.jobs, "report": say}
            done = import_dicom(arguments.folder, arguments.out, **given)
    _say_import(done)
    return 1 if done.table["status"].isin(["failed", "refused"]).any() or not done.table["take"].any() else 0


def _say_import(done) -> None:
    columns = ["subject", "side", "modality", "series_number", "n_images", "thickness_mm", "kernel", "echo", "status"]
    print(done.table[[*columns, "note"]].to_string(index=False, na_rep=""))
    for reason, count in sorted(done.skipped.items()):
        print(f"{count} files skipped: {reason}")
    counts = done.table["status"].value_counts()
    print(", ".join(f"{count} series {status}" for status, count in counts.items()))
    if not {"imported", "chosen"} & set(counts.index):
        print("no series came in: column note says why; ctsma import --choose writes a table to choose from")
    if done.manifest:
        print(f"manifest: {done.manifest} (fill in oa and kl_grade, then ctsma check-data {done.manifest})")


def _check_data(arguments: argparse.Namespace) -> int:
    from .cohort import read_manifest, write_text
    from .intake import check_knees

    manifest = read_manifest(arguments.manifest, arguments.root)
    with _Screen() as say:
        table = check_knees(manifest, deep=not arguments.quick, n_jobs=arguments.jobs, report=say)
    for row in table.to_dict("records"):
        print("{knee_id}  {column:10}{level:8} {check}: {finding}".format(**row))
    if arguments.out:
        write_text(arguments.out, table.to_csv(index=False))
    fatal, warnings = (int((table["level"] == level).sum()) for level in ("fatal", "warning"))
    print(f"{len(manifest)} knees, {fatal} fatal findings, {warnings} warnings")
    return 1 if fatal else 0


def _predict(arguments: argparse.Namespace) -> int:
    from . import prediction

    if bool(arguments.ct) == bool(arguments.manifest):
        raise InputFault("predict", "takes CTs or a manifest", "write ctsma predict CT:R ..., or --manifest FILE")
    if arguments.manifest:
        knees = prediction.manifest_cts(arguments.manifest, arguments.root)
    else:
        knees = prediction.listed_cts(arguments.ct, arguments.side)
    with _Screen() as say:
        table = prediction.predict_cts(knees, arguments.model, arguments.out, arguments.jobs, say)
    for row in table.to_dict("records"):
        print(f"{row['knee_id']}: {row['error'] or Path(arguments.out) / row['knee_id'] / 'report.html'}")
        for warning in filter(None, str(row.get("warnings") or "").split("; ") if not row["error"] else []):
            print(f"  warning: {warning}")
    return STUDY_FAILED if (table["error"] != "").any() else 0


def _export(arguments: argparse.Namespace) -> int:
    from . import prediction

    run = Path("runs") / arguments.name
    folder = prediction.export_model(run, arguments.out, arguments.arm, arguments.seed, arguments.jobs)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {size_mb:.1f} MB; {folder / 'MODEL_CARD.md'}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from . import report

    path = _run_folder(arguments.name)
    print(report.write_report(path))
    if arguments.readme:
        report.update_readme(arguments.readme, path / "results")
    return 0


class _Screen:
    """Says lines: a bar for lines of the form "what n/N ..." on a terminal, plain lines otherwise."""

    def __enter__(self):
        self.bar = tqdm(total=1, bar_format="{desc}{bar:30}{postfix}", leave=False) if sys.stderr.isatty() else None
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def __call__(self, line: str) -> None:
        counted = [word for word in line.split() if word.replace("/", "", 1).isdigit() and "/" in word]
        if self.bar is None:
            print(line, flush=True)
        elif counted:
            self.bar.n, self.bar.total = map(int, counted[0].split("/"))
            self.bar.set_description_str(line.split(counted[0])[0])
            self.bar.set_postfix_str(line[line.index(counted[0]) :])
        else:
            self.bar.write(line)


if __name__ == "__main__":
    sys.exit(main())
