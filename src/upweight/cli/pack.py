"""`upweight pack`: a run with all that it takes to look at it and to compute it again, as one file.

What is packed of the project is what run.toml names, as it was then: found beside a file that the
user names, and of the hash that the run keeps. No code is run, and no other file can get in.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import click

from upweight import report as pages
from upweight.cli.evaluate import checks_of, command
from upweight.cli.named import project_option
from upweight.cli.pages import alone
from upweight.cli.screen import Answer, size, verb
from upweight.runs.directory import OWN, PROJECT, Run
from upweight.runtime.atomic import replacing
from upweight.runtime.fingerprint import sha256


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    metavar="FILE.zip",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: RUN.zip]",
)
@project_option
@verb
def pack(run: Path, out: Path | None, projects: tuple[str, ...]) -> Answer:
    """Put a run, its page and the files of its project into one zip file.

    Files of the project are looked for beside those named by --project; only files that are as they
    were when the run was made are packed, and none is run. Trained models of `upweight evaluate`
    are left out.

    \b
    Examples:
        upweight pack runs/digits --project project.py
        upweight pack runs/digits --project project.py --out for-the-auditor.zip
    """
    place = Run.named(run.absolute(), projects)
    place.require_finished()
    place.open()  # which raises where scores are damaged
    target = run.with_name(run.name + ".zip") if out is None else out
    with place.held("upweight pack"):
        if not place.report.exists():
            evidence, again = checks_of(place), command(place, place.record)
            pages.html(place.load(), place.report, alone(place), evidence=evidence, command=again)
        files, missing = project_files(place, projects)
        way_out = "free space, or write it elsewhere: --out FILE.zip."
        with replacing(target, way_out) as file, zipfile.ZipFile(file, "w") as archive:
            for path in run_files(place):
                _add(archive, path, f"{run.name}/{path.relative_to(place.path).as_posix()}")
            for name, path in files.items():
                _add(archive, path, f"{run.name}/{PROJECT}/{name}")
    lines = [f"{target}: {size(target.stat().st_size)}; the run, its page"]
    lines[0] += f" and {', '.join(files)}" if files else ""
    lines += [f"  not packed: {name}, {why}" for name, why in missing.items()]
    lines.append(f"  who has it: unzip {target.name}; upweight show {run.name}")
    facts = {"run": str(place.path), "packed": str(target), "files": list(files),
             "missing": missing}  # fmt: skip
    return Answer("\n".join(lines), facts)


def run_files(place: Run) -> list[Path]:
    """What a run holds, without trained models and locks."""
    kept = OWN - {"retrained"}
    found = (p for name in kept for p in [place.path / name, *(place.path / name).rglob("*")])
    return sorted(p for p in found if p.is_file() and not p.is_symlink() and p.suffix != ".part")


def project_files(place: Run, projects: Iterable[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of the project that are as the run knows them, by name; and why others are missing."""
    record = place.record
    folders = [Path(each).resolve().parent for each in projects if Path(each).is_file()]
    known = {name: f"sha256 {digest}" for name, digest in record.sources.items()}
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name, told in {**known, **record.files}.items():
        inside = [(f / name).resolve() for f in folders if (f / name).resolve().is_relative_to(f)]
        there = [path for path in inside if path.is_file()]
        same = [path for path in there if told.startswith(f"sha256 {sha256(path)}")]
        if same:
            found[name] = same[0]
        elif there:
            missing[name] = "which has changed since, or whose hash the run does not keep"
        elif folders:
            missing[name] = f"not found in {', '.join(map(str, folders))}"
        else:
            missing[name] = "--project FILE.py says where it is"
    return found, missing


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """A file, with no time and no owner: two archives of one run are the same."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as into:
        while chunk := file.read(1 << 20):
            into.write(chunk)
