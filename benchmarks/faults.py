"""Kill commands with SIGKILL at random moments, and see whether anything is lost.

    python benchmarks/faults.py --kills 200

Each command runs once undisturbed. Then it is started again and again, and killed at a random moment; every
second kill waits for a file that is being written. After each kill every file must be whole, and nothing
that was finished may be missing or changed. A command that ends before its kill must have made what the
undisturbed one made: weights, averages, optimiser state, latents, images and pairs bit for bit, the numbers
of a report equal. Then its output is removed, and it begins anew.

The commands are forked from a process that has imported everything, so that a start takes a blink.
"""

import argparse
import gc
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file

EVERY = 3  # steps between checkpoints
STAGES = ("auxiliary", "flow", "sampler", "baseline", "distill")
TINY = [
    "clusters.count=0",
    "training.sampler_meanflow.guidance=null",
    "auxiliary.widths=[16,16]",
    "auxiliary.d_head=8",
    "flow.widths=[16]",
    "flow.depths=[1]",
    "flow.d_head=8",
    "flow.mapping_width=16",
    "sampler.widths=[16]",
    "sampler.depths=[1]",
    "sampler.d_head=8",
    "sampler.mapping_width=16",
    "training.precision=fp32",
    "training.log_every=1",
    "training.preview_every=6",
    "data.image_size=16",
    "data.channels=1",
    f"training.checkpoint_every={EVERY}",
    "training.distill.pairs=2048",
    "training.distill.teacher_steps=1",
    *(f"training.{stage}.batch_size=8" for stage in STAGES),
]
IMPORTED = [
    "lediflow.cli.app",
    "lediflow.training.run",
    "lediflow.evaluation.evaluate",
    "lediflow.evaluation.report",
    "lediflow.data.encode",
    "lediflow.pipelines.save",
    "diffusers.models.autoencoders.autoencoder_kl",
    "sklearn.datasets",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
]
TIMES = {"ms_per_image", "images_per_second", "timing_spread", "notes"}  # of a report: differ from run to run


@dataclass(frozen=True)
class Case:
    """A command and what it must keep.

    Attributes:
        arguments: of `lediflow`, for an output folder.
        kept: what is finished in an output folder, by name; a later state must have all of it.
        result: what must be equal in the end, by name.
        begin: makes the output folder that the command starts from.
    """

    arguments: Callable[[Path], list[str]]
    kept: Callable[[Path], dict[str, object]]
    result: Callable[[Path], dict[str, object]]
    begin: Callable[[Path], None] = lambda output: None


@dataclass
class Outcome:
    """What was done to one command."""

    kills: int = 0
    writing: int = 0  # kills that left a file or folder half written
    ends: int = 0  # times that it came to its end, and had made what the undisturbed one made
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.writing} of them amid writing; {self.ends} times it came to its end, "
            f"which was the undisturbed command's each time; {self.seconds:.0f} s"
        )


def case_of(command: str, source: Path, steps: int) -> Case:
    """Return a command's case; `source` has a trained run and a codec, `steps` are those of a stage."""
    run, pictures = str(source / "run"), str(source / "pictures")
    few = ["--device", "cpu", "--seed", "7"]
    cases = {
        "train": Case(
            lambda output: train(pictures, output, STAGES[:4], steps),
            newest_checkpoints,
            files,
        ),
        "encode": Case(
            lambda output: [
                *("encode", pictures, "--codec", str(source / "codec"), "--image-size", "16"),
                *("--batch-size", "5", "--shard-size", "10", "--device", "cpu", "-o", str(output)),
            ],
            lambda output: untouched(output, "*.parquet"),
            files,
        ),
        "sample": Case(
            lambda output: ["sample", run, "-n", "200", "--batch-size", "8", *few, "-o", str(output)],
            lambda output: contents(output, "0*.png"),  # half a batch is made again whole
            files,
        ),
        "evaluate": Case(
            lambda output: [
                *("evaluate", run, f"{run}/baseline", "--data", pictures, "--features", "classifier"),
                *("--steps", "1", "--bootstrap", "2", "--classifier-steps", "10", "-n", "16"),
                *("--batch-size", "4", *few),
                *("--cache", str(output / "cache"), "-o", str(output)),
            ],
            lambda output: untouched(output, "rows/*.json", "cache/*"),
            lambda output: {**files(output / "rows"), **files(output / "cache"), "report": numbers(output)},
        ),
        "distill": Case(
            lambda output: train(pictures, output, ["distill"], 6),
            lambda output: untouched(output, "distill/pairs/*") | newest_checkpoints(output),
            files,
            lambda output: shutil.copytree(run, output) and None,
        ),
    }
    return cases[command]


COMMANDS = ("train", "encode", "sample", "evaluate", "distill")


def train(pictures: str, output: Path, stages: list[str] | tuple[str, ...], steps: int) -> list[str]:
    settings = [*TINY, *(f"training.{stage}.steps={6 if stage == 'distill' else steps}" for stage in STAGES)]
    parts = ["train", "digits", "--data", pictures, "--device", "cpu", "--output", str(output)]
    parts += [part for stage in stages for part in ("--stage", stage)]
    return parts + [part for setting in settings for part in ("--set", setting)]


# What is finished, and what it says


def finished_files(folder: Path) -> Iterator[Path]:
    """All files but those that are being written, or lie in a folder that is."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts):
                yield path
        except FileNotFoundError:
            continue


def half_written(folder: Path) -> list[str]:
    """Names of what is being written, or was when the process died."""
    found = []
    for place, folders, names in os.walk(folder):
        found += [f"{place}/{name}" for name in (*folders, *names) if name.startswith(".")]
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(output: Path, *patterns: str) -> dict[str, object]:
    """Contents of finished files."""
    found = [path for pattern in patterns for path in output.glob(pattern)]
    return {str(path.relative_to(output)): digest(path) for path in found if path.name[0] != "."}


def untouched(output: Path, *patterns: str) -> dict[str, object]:
    """Contents of finished files, and when they were made: they must not be made again."""
    found = contents(output, *patterns)
    return {name: (said, (output / name).stat().st_mtime_ns) for name, said in found.items()}


def newest_checkpoints(run: Path) -> dict[str, object]:
    """The newest checkpoint of each stage; no step since then but the last few is in its log."""
    found: dict[str, object] = {}
    for folder in sorted(run.glob("*/checkpoints")):
        steps = [int(path.name[5:]) for path in folder.glob("step-*")]
        newest, logged = max(steps, default=0), [step for step, *_ in metrics(folder.parent)]
        assert max(logged, default=0) - newest <= EVERY, f"{folder}: more than {EVERY} steps lost"
        for step in steps:
            state = json.loads((folder / f"step-{step}" / "state.json").read_text())
            assert state["step"] == step, f"{folder}/step-{step} says it is step {state['step']}"
        if newest:
            found[folder.parent.name] = newest
    return found


def metrics(stage: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of the whole lines of a stage's log."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in whole]


def files(folder: Path) -> dict[str, object]:
    """Contents of all files but logs and times, whose numbers are read."""
    found: dict[str, object] = {}
    for path in finished_files(folder):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = metrics(path.parent)
        elif not name.startswith(("logs/", "times-")):
            found[name] = digest(path)
    return found


def numbers(output: Path) -> dict[str, object]:
    """The numbers of a report, without its times."""
    results = json.loads((output / "results.json").read_text())
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in results.pop("rows")]
    assert (output / "report.html").is_file() and (output / "table.md").is_file()
    return {key: value for key, value in results.items() if key not in TIMES} | {"rows": rows}


READERS = {
    ".png": lambda data: Image.open(io.BytesIO(data), formats=["PNG"]).load(),
    ".json": json.loads,
    ".parquet": lambda data: pq.read_table(io.BytesIO(data)),
}


def check_whole(folder: Path) -> None:
    """Read every file that has its name."""
    for path in finished_files(folder):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix in READERS:
                READERS[path.suffix](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path} is not whole: {error}") from error


# Killing


def context() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes that have imported all that the commands need."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # no threads before the fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_command(arguments: list[str], log: Path) -> None:
    """Be `lediflow ARGUMENTS`; what it prints goes to `log`."""
    _print_to(log)
    gc.freeze()  # what was imported is not searched for garbage, time and again
    sys.argv = ["lediflow", *arguments]
    from lediflow.cli.app import main

    main()


def draw_pictures(folder: Path) -> None:
    """Draw two classes of small pictures, for training and held out."""
    for i in range(100):
        split, kind = ("train", "validation")[i >= 70], ("bar", "box")[i % 2]
        picture, x, y = Image.new("L", (16, 16)), i % 9, i % 7
        picture.paste(120 + i, (x, y, x + 3 + 3 * (i % 2), y + 8))
        path = folder / split / kind / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def make_codec(folder: Path, log: Path) -> None:
    """Save a random autoencoder."""
    _print_to(log)
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)


def _print_to(log: Path) -> None:
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def prepare(source: Path, commands: tuple[str, ...], log: Path) -> None:
    """Draw, train and save what the commands start from."""
    source.mkdir(parents=True, exist_ok=True)
    draw_pictures(source / "pictures")
    jobs: list[tuple[Callable[..., None], tuple]] = []
    if "encode" in commands:
        jobs.append((make_codec, (source / "codec", log)))
    if {"sample", "evaluate", "distill"} & set(commands):
        stages = STAGES[:4] if "evaluate" in commands else STAGES[:3]
        jobs.append((run_command, (train(str(source / "pictures"), source / "run", stages, 6), log)))
    for target, arguments in jobs:
        process = context().Process(target=target, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0, log.read_text()


def wait_to_kill(process: multiprocessing.Process, output: Path, delay: float, writing: bool) -> None:
    """Return at the moment to kill: after `delay` seconds, then amid writing; or when the process ends."""
    process.join(delay)
    while writing and process.exitcode is None and not half_written(output):
        process.join(0)
    if writing:
        process.join(random.uniform(0, 0.002))


def torture(source: Path, folder: Path, command: str, *, kills: int, steps: int = 12) -> Outcome:
    """Kill a command `kills` times, and compare each of its ends with the undisturbed one's.

    Args:
        source: folder that `prepare` filled.
        folder: to work in.
        command: one of COMMANDS.
        kills: how many.
        steps: of each stage that `train` trains.

    Raises:
        AssertionError: something was lost or half-written, a restart failed, or an end differs.
    """
    case, outcome, began = case_of(command, source, steps), Outcome(), time.monotonic()
    # the same last name, for a model card has it
    undisturbed, output, log = folder / "undisturbed" / "run", folder / "killed" / "run", folder / "log.txt"

    def start(place: Path) -> multiprocessing.Process:
        process = context().Process(target=run_command, args=(case.arguments(place), log))
        process.start()
        return process

    folder.mkdir(parents=True, exist_ok=True)
    case.begin(undisturbed)
    process, started = start(undisturbed), time.monotonic()
    process.join()
    assert process.exitcode == 0, log.read_text()
    expected, seconds, before = case.result(undisturbed), time.monotonic() - started, {}
    case.begin(output)
    while True:
        process = start(output)
        if outcome.kills < kills:
            wait_to_kill(process, output, random.uniform(0, seconds), writing=outcome.kills % 2 == 1)
            process.kill()
        process.join()
        assert process.exitcode in (0, -9), f"{command} failed:\n{log.read_text()[-3000:]}"
        now = kept_of(case, output, before)
        if process.exitcode == 0:
            check_end(case.result(output), expected, output)
            outcome.ends += 1
            if outcome.kills == kills:
                outcome.seconds = time.monotonic() - began
                return outcome
            shutil.rmtree(output)
            case.begin(output)
            now = {}
        else:
            outcome.kills += 1
            outcome.writing += bool(half_written(output))
        before = now


def kept_of(case: Case, output: Path, before: dict[str, object]) -> dict[str, object]:
    """Return what is finished; nothing of what was finished `before` may be missing or made again."""
    check_whole(output)
    now = case.kept(output)
    for name, there in before.items():
        assert name in now, f"{output}: {name} is lost"
        if isinstance(there, int):
            assert now[name] >= there, f"{output}: {name} fell from {there} to {now[name]}"
        else:
            assert now[name] == there, f"{output}: {name} is another, or was made again"
    return now


def check_end(result: dict[str, object], expected: dict[str, object], output: Path) -> None:
    """Compare an end with the undisturbed one; nothing half-written may be left."""
    different = [name for name in sorted({*result, *expected}) if result.get(name) != expected.get(name)]
    assert not different, f"differ from the undisturbed command's: {different}"
    left = [name for name in half_written(output) if "/cache/" not in name]
    assert not left, f"left half-written: {left}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--command", default=",".join(COMMANDS), help="which, separated by commas")
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--steps", type=int, default=12, help="of each stage of train")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    a = parser.parse_args()
    commands = tuple(a.command.split(","))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        prepare(source, commands, source / "log.txt")
        for i, command in enumerate(commands):
            random.seed(f"{a.seed} {command}")  # the same moments, alone and in company
            kills = a.kills // len(commands) + (i < a.kills % len(commands))
            done = torture(source, Path(folder, command), command, kills=kills, steps=a.steps)
            print(f"{command}: {done}", flush=True)
    print(f"{a.kills} kills, nothing lost")


if __name__ == "__main__":
    main()
