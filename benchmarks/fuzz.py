"""Feed everything that a user can hand over with what Hypothesis makes up, and see what is no UserError.

    python benchmarks/fuzz.py --cases 10000 --json fuzz.json

Families of cases, each in a process of its own, so that a crash or a lack of memory is seen too:

pictures    files of every format and mode, cut, damaged, with lying headers, rotated, animated, of no pixels
datasets    folders, tables and tar files of such pictures under any names; latents folders with files damaged
masks       a photo and its mask: such pictures, the photo itself, its alpha channel; any padding
arguments   what DATASET may be: any text
configs     YAML: presets with values changed, and texts and bytes of every kind
settings    --set KEY=VALUE
pipelines   a saved pipeline with files cut, missing, swapped, or changed inside
resumed     a run folder damaged in the same way, and `train` given again

A case passes if nothing is raised but UserError (BrokenImageError for a picture) within a minute. The script
ends with exit code 1 if a case fails, and prints what failed, most frequent first.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_folders
import fuzz_texts
from fuzz_pictures import check_mask, check_picture, mask_case, picture_case
from hypothesis import HealthCheck, Phase, given, seed, settings

SHARES = {  # of all cases
    "pictures": 0.48,
    "masks": 0.05,
    "datasets": 0.03,
    "arguments": 0.10,
    "configs": 0.10,
    "settings": 0.16,
    "pipelines": 0.075,
    "resumed": 0.005,
}
SECONDS = 60  # for a case
FAMILIES: dict[str, tuple[Any, Callable[[Any, Path], None]]] = {
    "pictures": (picture_case(), check_picture),
    "masks": (mask_case(), check_mask),
    "datasets": (fuzz_folders.dataset_case(), fuzz_folders.check_dataset),
    "arguments": (fuzz_texts.ARGUMENTS, fuzz_texts.check_argument),
    "configs": (fuzz_texts.config_case(), fuzz_texts.check_config),
    "settings": (fuzz_texts.setting_case(), fuzz_texts.check_setting),
    "pipelines": (fuzz_folders.damage(), fuzz_folders.check_pipeline),
    "resumed": (fuzz_folders.damage(), fuzz_folders.check_resumed),
}


def survives(family: str, case: Any) -> None:
    """Run one case.

    Raises:
        Exception: whatever is no UserError, or a TimeoutError.
    """
    from lediflow.errors import UserError

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FAMILIES[family][1](case, Path(folder))
    except UserError as error:
        assert str(error).strip(), "an error without words"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_family(family: str, cases: int, first: int) -> dict[str, Any]:
    """Run so many cases of a family and return what failed, by a line that tells where."""
    import resource

    found: Counter[str] = Counter()
    examples: dict[str, str] = {}
    count, slowest = 0, 0.0

    @seed(first)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(FAMILIES[family][0])
    def body(case: Any) -> None:
        nonlocal count, slowest
        count += 1
        began = time.monotonic()
        try:
            survives(family, case)
        except Exception as error:
            where = [f for f in traceback.extract_tb(error.__traceback__) if "lediflow" in f.filename]
            line = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "?"
            text = f"{type(error).__name__} at {line}: {str(error)[:120]!r}"
            key = f"{type(error).__name__} at {line}"
            found[key] += 1
            examples.setdefault(key, f"{text} from {case!r:.1500}")
        slowest = max(slowest, time.monotonic() - began)

    body()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"family": family, "cases": count, "slowest_s": round(slowest, 1), "peak_mb": peak,
            "failed": dict(found.most_common()), "examples": examples}  # fmt: skip


def _in_a_process(family: str, cases: int, first: int, run: Path, cache: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--family",
        family,
        "--cases",
        str(cases),
        "--seed",
        str(first),
        "--run",
        str(run),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    except (IndexError, ValueError):
        failed = {f"the process ended with {done.returncode}": 1}
        return {"family": family, "cases": 0, "slowest_s": 0, "peak_mb": 0, "failed": failed,
                "examples": {next(iter(failed)): done.stderr[-2000:]}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of all families together")
    parser.add_argument("--family", choices=SHARES, help="only this one, in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="run folder to damage; default: one is trained")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = a.run or fuzz_folders.make_run(Path(scratch, "run"))
        fuzz_folders.RUN.append(run)
        if a.family:
            print(json.dumps(run_family(a.family, a.cases, a.seed)))
            return
        results = []
        for family, share in SHARES.items():
            results.append(
                _in_a_process(family, max(1, round(share * a.cases)), a.seed, run, Path(scratch, family))
            )
            print(f"{family}: {results[-1]['cases']:,} cases", file=sys.stderr, flush=True)
    print("| family | cases | failed | slowest | peak memory |\n| --- | ---: | ---: | ---: | ---: |")
    for r in results:
        failed = sum(r["failed"].values())
        print(f"| {r['family']} | {r['cases']:,} | {failed:,} | {r['slowest_s']} s | {r['peak_mb']:,} MB |")
    for r in results:
        for key, count in r["failed"].items():
            print(f"{r['family']}: {count} times {key}\n    {r['examples'][key]}")
    if a.json:
        a.json.write_text(json.dumps(results, indent=1))
    sys.exit(any(r["failed"] for r in results))


if __name__ == "__main__":
    main()
