"""Build ChainBench, 36 problems with every chain scored, and describe how hard each one is.

    python experiments/chainbench.py

The run takes 7 to 13 minutes on 2 CPU cores (AMD EPYC). `--quick` builds four problems of the wine
data in one minute.

Expected result: out of 10,000 chains, at most 3 are within 1% of the best one, and 1 to 31 are
local optima.

Banks and tables are kept in ~/.cache/jchain/chainbench (`--folder`), where `jchain.chainbench.load`
finds them. Existing files are checked and kept, so an interrupted build continues where it stopped.
The script writes chainbench.json to experiments/results.
"""

import time
from typing import Any

from records import describe_machine, make_parser

import jchain as jc
from jchain import files

COLUMNS = {
    "chains": "{:,}",
    "best": "{:.4f}",
    "within_1_percent": "{:.3%}",
    "within_5_percent": "{:.3%}",
    "within_10_percent": "{:.3%}",
    "local_optima": "{:.2%}",
    "search_to_test": "{:.2f}",
    "best_on_test": "{:.2f}",
}


def main() -> None:
    parser = make_parser(
        __doc__, quick="four problems; nothing is written to --out", has_folder=True
    )
    args = parser.parse_args()
    names = [
        name
        for name in jc.chainbench.NAMES
        if not args.quick or (name.startswith("wine") and name.endswith("0"))
    ]
    print("| problem | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    start, rows = time.perf_counter(), []
    for name in names:
        jc.chainbench.build(args.folder, [name])
        rows.append(jc.chainbench.describe(jc.chainbench.load(args.folder, name)))
        print(format_row(rows[-1]), flush=True)
    if args.quick:
        return
    result = {
        **describe_machine(),
        "seconds": round(time.perf_counter() - start),
        "problems": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out / "chainbench.json", result)


def format_row(row: dict[str, Any]) -> str:
    return (
        f"| {row['name']} | "
        + " | ".join(form.format(row[name]) for name, form in COLUMNS.items())
        + " |"
    )


if __name__ == "__main__":
    main()
