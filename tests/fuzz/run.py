"""Damage files at random and read them.

    python tests/fuzz/run.py --num 10000
    python tests/fuzz/run.py --num 1 --first 4711 --only "bank header"

Each file that cannot be read must end in a ValueError or an OSError that names it, in less than 5
seconds, without a process that dies or that takes more than 2 GiB. Each target runs in a process of
its own, unless `--together` is given, and failures are printed with the number that repeats them.
"""

import argparse
import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

TESTS = Path(__file__).parent.parent
MAX_SECONDS, MAX_BYTES = 5, 2 * 2**30
# Texts that are not read from a file, so that their errors cannot name one.
NAMELESS = ("search.json",)


class TookTooLong(BaseException):
    """A file that was read for too long."""


def fuzz(name: str, first: int, num: int, folder: Path) -> dict[str, int]:
    """Damage and read the files of one target, and count what happened."""
    import jax
    from fuzz.targets import TARGETS, Refused

    jax.config.update("jax_disable_most_optimizations", True)

    def stop(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, stop)
    target, counts = TARGETS[name], collections.Counter()
    path = target.make(folder)
    whole = path.read_bytes()
    for number in range(first, first + num):
        (folder / "number").write_text(str(number))
        path.write_bytes(whole)
        target.damage(random.Random(number), path)
        signal.alarm(MAX_SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(path)
            outcome, why = "accepted", ""
        except (ValueError, OSError, Refused) as error:
            is_named = name in NAMELESS or str(path.parent) in str(error)
            is_line = "Traceback" not in str(error)
            outcome, why = ("refused", "") if is_named and is_line else ("failed", repr(error))
        except BaseException:
            outcome, why = "failed", "".join(traceback.format_exc(limit=-4))
        finally:
            signal.alarm(0)
        counts[outcome] += 1
        if outcome == "failed":
            print(f"{name}, number {number}:\n{why}")
    if read_peak() > MAX_BYTES:
        counts["took more than 2 GiB"] += 1
    return dict(counts)


def read_peak() -> int:
    """Return the peak of this process in bytes; 0 where it is not known.

    On Linux, `ru_maxrss` of a new process includes the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(name: str, first: int, num: int) -> dict[str, int]:
    """Run `fuzz` in a process of its own, again after it died."""
    counts: collections.Counter[str] = collections.Counter()
    end = first + num
    while first < end:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, __file__, "--child", name, folder]
            done = subprocess.run(
                [*call, "--first", str(first), "--num", str(end - first)],
                capture_output=True,
                text=True,
            )
            *lines, last = done.stdout.splitlines() or [""]
            if done.returncode == 0:
                print("\n".join(lines), end="\n" if lines else "")
                return dict(counts + collections.Counter(json.loads(last)))
            number = int((Path(folder) / "number").read_text())
        print(f"{name}, number {number}: the process died ({done.returncode})")
        print(done.stderr[-2000:])
        counts["died"] += 1
        first = number + 1
    return dict(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num", type=int, default=1000, help="number of files of each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", action="append", help="name of a target")
    parser.add_argument("--together", action="store_true", help="read all files in this process")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, folder = args.child
        print(json.dumps(fuzz(name, args.first, args.num, Path(folder))))
        return 0
    from fuzz.targets import TARGETS

    is_clean = True
    for name in args.only or TARGETS:
        began = time.monotonic()
        if args.together:
            with tempfile.TemporaryDirectory() as folder:
                counts = fuzz(name, args.first, args.num, Path(folder))
        else:
            counts = run(name, args.first, args.num)
        shown = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
        print(f"{name}: {shown} in {time.monotonic() - began:.0f} s", flush=True)
        is_clean &= set(counts) <= {"accepted", "refused"}
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    sys.exit(main())
