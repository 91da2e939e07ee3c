"""Run every experiment, and write the answers to experiments/README.md.

    python experiments/report.py

The run takes about 9 hours on 2 CPU cores. `--quick` runs small sizes of each script in 10 minutes
and writes nothing.

The answers are in questions.md. Each figure there is a placeholder [[file > key > ... | format]],
which is filled in from experiments/results/file.json, and each table a placeholder [[file.md]]. So
no figure in README.md is typed by hand. `--write` only fills in the placeholders. Otherwise, each
script runs in turn. Finished parts are kept, so an interrupted run continues where it stopped. If a
script fails, the others still run, and the failed one is named at the end.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from jchain import files

FOLDER = Path(__file__).parent
# The first one makes the tables that others read. Then the longest small sizes first, as two run
# at a time.
SCRIPTS = (
    "chainbench",
    "main_job",
    "updates",
    "inverse",
    "stopping",
    "gradient_trends",
    "gradient_retrieval",
    "state",
    "images",
    "values",
    "arena",
    "own_net",
    "controller",
    "transformer_depth",
    "staged",
)
# Scripts of later questions, left out of `--quick` here; each has a `--quick` of its own.
NOT_QUICK = ("arena", "own_net", "controller", "transformer_depth")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    mode.add_argument(
        "--write", action="store_true", help="only write README.md, from existing results"
    )
    args = parser.parse_args()
    failed = [] if args.write else run_all(quick=args.quick)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if not args.quick:
        text = render((FOLDER / "questions.md").read_text(), FOLDER / "results")
        files.write_atomically(FOLDER / "README.md", lambda path: Path(path).write_text(text))
    return 1 if failed else 0


def run_all(*, quick: bool) -> list[str]:
    """Run all scripts and return the names of those that failed.

    They run in turn because most of them use all cores. Small sizes mostly compile, so two of them
    run at a time.
    """
    first, *others = [name for name in SCRIPTS if not (quick and name in NOT_QUICK)]
    start = time.perf_counter()
    with ThreadPoolExecutor(2 if quick else 1) as pool:
        codes = {first: run(first, start, quick=quick)}  # the others read its tables
        codes |= zip(others, pool.map(partial(run, start=start, quick=quick), others), strict=True)
    return [name for name, code in codes.items() if code != 0]


def run(name: str, start: float, *, quick: bool) -> int:
    """Run one script and return its exit code."""
    began = time.perf_counter()
    print(f"== {name}", flush=True)
    command = [sys.executable, str(FOLDER / f"{name}.py"), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=quick, text=True)
    now = time.perf_counter()
    output = f"{done.stdout}{done.stderr}" if quick else ""
    print(f"{output}== {name}: {now - began:.0f} s, {now - start:.0f} s in all", flush=True)
    return done.returncode


def render(text: str, results: Path) -> str:
    """Fill in each [[file > key > ... | format]] from file.json, and each [[file.md]].

    Raises: FileNotFoundError: if the file of a table is missing. ValueError: if a JSON file or a
    value is missing.
    """
    loaded: dict[str, Any] = {}

    def fill(match: re.Match[str]) -> str:
        place, _, form = match[1].partition(" | ")
        if place.endswith(".md"):
            return (results / place).read_text().strip()
        name, *keys = place.split(" > ")
        if name not in loaded:
            path = results / f"{name}.json"
            if not path.exists():
                raise ValueError(f"expected a file for [[{match[1]}]], got no {path}")
            loaded[name] = json.loads(path.read_text())
        value = loaded[name]
        for key in keys:
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                known = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
                raise ValueError(
                    f"expected a value for [[{match[1]}]], got {known} where {key!r} was looked up"
                ) from None
        return f"{value / 60:.0f} minutes" if form == "minutes" else format(value, form)

    return re.sub(r"\[\[(.+?)\]\]", fill, text)


if __name__ == "__main__":
    sys.exit(main())
