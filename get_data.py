"""Download chest CTs of the Imaging Data Commons by name: choose by written rules, fetch, verify, record the sources.

    python get_data.py --list
    python get_data.py lidc --patients 200 --output CTS
    python get_data.py --collections nlst,lidc --patients 1000 --with-scouts --output CTS --dry-run

One CT per patient, as DICOM in CTS/ID/ct (scouts in CTS/ID/scouts, films in CTS/ID/films), and CTS/sources.csv with
collection, series, licence and DOI of each; `prepare_data.py --input CTS` takes the folder as it is. No account is
needed. The same command goes on where it was stopped; more patients are added to those that are there. The rules are in
docs/datasets.md. Needs `pip install idc-index`. A folder that could not be completed is named at the end, and the exit
status is 1.
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import io
import sys
from pathlib import Path

from xray2ct.command_line import Parser
from xray2ct.data.archive.catalogue import as_markdown, catalogue, gigabytes
from xray2ct.data.archive.collections import LICENCES, check_licence, resolve
from xray2ct.data.archive.download import download, people_in, plan
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.selection import select
from xray2ct.data.archive.transfer import ENDPOINT
from xray2ct.files import InputError, run_cli

ASK_GB = 20.0


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="COLLECTION", help="such as lidc, nlst, covid_ny: see --list")
    parser.add_argument("--collections", default="", help="the same, separated by commas")
    parser.add_argument("--output", type=Path, help="folder to make or complete")
    parser.add_argument("--patients", type=int, help="how many, over all collections together (default all)")
    parser.add_argument(
        "--licence", default="cc-by", help=f"{' or '.join(LICENCES)} (also non-commercial; default cc-by)"
    )
    parser.add_argument(
        "--with-scouts", action="store_true", help="also the CT session's scouts; who has two comes first"
    )
    parser.add_argument("--with-films", action="store_true", help="also chest films; who has some comes first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be downloaded, and stop")
    parser.add_argument("--list", action="store_true", help="show the collections, as a table in Markdown, and stop")
    parser.add_argument("--yes", action="store_true", help=f"do not ask above {ASK_GB:g} GB")
    parser.add_argument("--workers", type=int, default=32, help="parallel transfers (default %(default)s)")
    parser.add_argument("--endpoint-url", default=ENDPOINT, help="S3 server (default %(default)s)")
    return parser.parse_args(argv)


def _check_args(args) -> None:
    check_licence(args.licence)
    for name in ("patients", "workers"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 1_000_000:
            raise InputError(f"--{name} is {value}; expected 1 or more")
    if args.output is None and not args.dry_run:
        raise InputError("--output is missing; expected a folder for the CTs (or --dry-run, --list)")


def _confirmed(size: float, yes: bool) -> bool:
    if size <= ASK_GB or yes:
        return True
    if not sys.stdin.isatty():
        raise InputError(f"{size:.1f} GB are more than {ASK_GB:g}; expected --yes, or fewer --patients")
    return input(f"Download {size:.1f} GB? [y/N] ").strip().lower() in ("y", "yes")


def main(argv=None, index: ArchiveIndex | None = None) -> int:
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # authors' names on a terminal without their letters
    if args.list:
        index = index or ArchiveIndex()
        print(as_markdown(catalogue(index)))
        print(f"\nidc-index-data {index.version}; scouts, films: how many of the patients have them too")
        return 0
    _check_args(args)
    names = [name for text in (*args.names, args.collections) for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no collection named; expected one or more, such as lidc (get_data.py --list shows them)")
    index = index or ArchiveIndex()
    taken = people_in(args.output) if args.output else {}
    collections = resolve(names, index.collections())
    series = select(index, collections, args.licence, args.patients, args.with_scouts, args.with_films, taken)
    print("\n".join(plan(series, index)))
    people = len({one.id for one in series})
    print(f"together {people} patients, {gigabytes(series):.1f} GB (index {index.version})")
    if args.patients and people < args.patients:
        print(f"note: {args.patients} patients were asked for, {people} fit")
    if args.dry_run or not _confirmed(gigabytes(series), args.yes):
        return 0
    problems = download(series, args.output, args.endpoint_url, args.workers)
    for text in problems.values():
        print(f"not complete: {text}")
    print(f"{people - len({path.parent for path in problems})} of {people} patients are complete in {args.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_cli(main)
