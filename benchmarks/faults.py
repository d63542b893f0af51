"""Kill a training process with SIGKILL at random moments, and see whether anything is lost.

    python benchmarks/faults.py --kills 20

Trains digits with small networks twice: once undisturbed, and once killed and started again by the same
command. Every second kill waits for a checkpoint that is being written. After each kill all checkpoints must
be readable, none may be missing, and at most the steps since the last one may be lost. In the end weights,
averages and optimiser state must equal those of the undisturbed run bit for bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

EVERY = 3  # steps between checkpoints
SIZES = [
    "auxiliary.widths=[32,64]",
    "flow.widths=[64]",
    "flow.depths=[2]",
    "sampler.widths=[64]",
    "sampler.depths=[2]",
    "training.precision=fp32",
    "training.log_every=1",
    "training.preview_every=10",
    f"training.checkpoint_every={EVERY}",
]


@dataclass
class Kill:
    """One SIGKILL and what was found afterwards."""

    stage: str
    step: int  # the last that was logged
    newest: int  # the last that had a checkpoint
    writing: bool  # whether a half-written checkpoint was left


def command(run: Path, stages: list[str], steps: int) -> list[str]:
    settings = [*SIZES]
    for stage in stages:
        settings += [f"training.{stage}.steps={steps}", f"training.{stage}.batch_size=8"]
    parts = [sys.executable, "-m", "lediflow", "train", "digits", "--device", "cpu", "--output", str(run)]
    for stage in stages:
        parts += ["--stage", stage]
    for setting in settings:
        parts += ["--set", setting]
    return parts


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file)


def progress(run: Path, stages: list[str]) -> tuple[str, int]:
    """The stage that is being trained and the last step in its log."""
    for stage in reversed(stages):
        path = run / stage / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole:
            return stage, json.loads(whole[-1])["step"]
    return stages[0], 0


def checkpoints(run: Path, stage: str) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / stage / "checkpoints").glob("step-*"))


def half_written(run: Path) -> bool:
    return any(run.glob("*/checkpoints/.step-*.new"))


def wait_to_kill(process: subprocess.Popen, run: Path, target: tuple[str, int], writing: bool) -> None:
    """Return at the moment to kill: a blink after the stage and step `target`, then amid `writing`."""
    while process.poll() is None and not reached(run, target):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    while writing and process.poll() is None and not half_written(run):
        pass
    time.sleep(random.uniform(0, 0.004))


def reached(run: Path, target: tuple[str, int]) -> bool:
    stage, step = target
    return progress(run, [stage])[1] >= step


def later(position: tuple[str, int], count: int, stages: list[str], steps: int) -> tuple[str, int]:
    """The stage and step `count` steps after a position."""
    index = stages.index(position[0]) * steps + position[1] + count - 1
    return stages[index // steps], index % steps + 1


def inspect(run: Path, stages: list[str], earlier: dict[str, list[int]]) -> Kill:
    """Check what a killed process left."""
    stage, step = progress(run, stages)
    for name in stages:
        there = checkpoints(run, name)
        assert not earlier[name] or (there and there[-1] >= earlier[name][-1]), f"{name} lost a checkpoint"
        for number in there:
            folder = run / name / "checkpoints" / f"step-{number}"
            assert json.loads((folder / "state.json").read_text())["step"] == number
            assert all(load_file(folder / f"{f}.safetensors") for f in ("model", "ema", "optimizer"))
    newest = (checkpoints(run, stage) or [0])[-1]
    assert step - newest <= EVERY, f"{stage}: {step - newest} steps lost"
    return Kill(stage, step, newest, half_written(run))


def differences(a: Path, b: Path, stages: list[str]) -> list[str]:
    """What differs between the last checkpoints of two runs."""
    found = []
    for stage in stages:
        name = f"step-{checkpoints(a, stage)[-1]}"
        left, right = (run / stage / "checkpoints" / name for run in (a, b))
        for path in sorted(left.iterdir()):
            if not (right / path.name).exists() or path.read_bytes() != (right / path.name).read_bytes():
                found.append(f"{stage}/{name}/{path.name}")
    return found


def torture(folder: Path, *, kills: int, stages: list[str], steps: int, seed: int = 0) -> list[Kill]:
    """Kill a run `kills` times, finish it, and compare it with an undisturbed one.

    Raises:
        AssertionError: something was lost, a restart failed, or the final states differ.
    """
    random.seed(seed)
    undisturbed, killed, log = folder / "undisturbed", folder / "killed", folder / "log.txt"
    assert start(command(undisturbed, stages, steps), log).wait() == 0, log.read_text()
    most = len(stages) * steps // (kills + 2)  # new steps before a kill, so that none comes too late
    again, found = command(killed, stages, steps), []
    for n in range(kills):
        earlier = {stage: checkpoints(killed, stage) for stage in stages}
        target = later(progress(killed, stages), random.randint(1, most), stages, steps)
        process = start(again, log)
        wait_to_kill(process, killed, target, writing=n % 2 == 1)
        assert process.poll() is None, f"ended before kill {n + 1}:\n{log.read_text()[-2000:]}"
        process.kill()
        process.wait()
        found.append(inspect(killed, stages, earlier))
    assert start(again, log).wait() == 0, log.read_text()[-2000:]
    different = differences(undisturbed, killed, stages)
    assert not different, f"differ from the undisturbed run: {different}"
    left = [str(p) for p in killed.rglob(".*")]
    assert not left, f"left half-written: {left}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120, help="of each stage")
    parser.add_argument("--stages", default="auxiliary,flow,sampler,baseline", help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = torture(Path(folder), kills=a.kills, stages=a.stages.split(","), steps=a.steps, seed=a.seed)
    for n, kill in enumerate(kills, start=1):
        note = ", a checkpoint half written" if kill.writing else ""
        print(f"kill {n}: {kill.stage} at step {kill.step}, {kill.step - kill.newest} steps lost{note}")
    lost = sum(kill.step - kill.newest for kill in kills)
    print(
        f"{len(kills)} kills, {sum(kill.writing for kill in kills)} of them amid a checkpoint; every restart "
        f"went on, {lost} steps were made again, and the final state equals the undisturbed run's bit for bit"
    )


if __name__ == "__main__":
    main()
