"""54 days of the 88B on 1,024 GPUs with the faults of Llama 3, in simulated time: how much of it trains.

    python benchmarks/goodput.py [--precision bf16|fp8] [--interval STEPS]

examples/pretrain_88b.sh runs as it is, over and over, with programs of SLURM's names that move a clock instead of
waiting: its node checks, tries, requeues, exclusions and the end of each life are the real ones. Checkpoints are made
and chosen by the package `checkpoint`: fence, commit, verification, retention. What is assumed is in ASSUMED.

Faults: table 5 of "The Llama 3 Herd of Models" (2024), 419 unexpected interruptions of 16,384 GPUs in 54 days, scaled
to 1,024 GPUs by rate; its 47 planned ones are taken whole. What storage, clocks and hands do beside them has rates that
are assumed. docs/cluster.md discusses the result.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from megatron_mm.checkpoint.format import Fence, commit, remove_old, set_aside, step_of, whole_ones  # noqa: E402
from megatron_mm.checkpoint.verify import find_damage  # noqa: E402

BAR = 0.97
DAYS = 54
POOL, NODES, TRAIN_NODES = 136, 130, 128
"""Nodes of the cluster, of the job (two are spare), and that train."""
SEED = 0
CHECK_SECONDS = 300
PRESETS = {"bf16": "mm_88b", "fp8": "mm_88b_fp8"}
STEP_SECONDS = {"bf16": 4.70, "fp8": 3.22}
"""Of a step by the plans of these presets on 1,024 H100 (examples/plans); no more while a save is written beside it."""
ASSUMED = {
    "save_stall_seconds": 5.0,  # each save: description, copy to the host, commit
    "save_seconds": 90.0,  # until a background save is committed: 1.24 TB at 15 GB/s
    "preflight_seconds": 60.0,  # the script checks all that a start would on one CPU: 35 s of it on two busy cores
    "check_seconds": 60.0,  # the nodes check themselves
    "start_seconds": 240.0,  # imports, NCCL's communicators, building and warming up, on 1,024 ranks
    "load_seconds": 60.0,  # 1.24 TB at 25 GB/s, hashed by 1,024 ranks beside it
    "queue_seconds": 300.0,  # until a requeued job runs again, on nodes that are fit: SLURM's own pause is 120 s
    "repair_seconds": 86_400.0,  # a node whose hardware failed comes back after a day
    "life_seconds": 86_400.0,  # --time of the script, which saves 900 s before
    "margin_seconds": 900.0,
    "planned_seconds": 120.0,  # a planned interruption is asked for by signal, and the job queues again
    "full_storages": 3,  # in 54 days; somebody fills the file system, and its watch needs some minutes to make room
    "full_seconds": 300.0,
    "passing_read_errors": 0.05,  # of all resumes: 1,024 clients that begin to read at once overload a server
    "read_retry_seconds": 60.0,  # back-off until the read succeeds
    "slow_prologs": 0.05,  # of all lives: an image is unpacked anew, or a name service is slow, on all nodes
    "prolog_seconds": 400.0,  # longer than the check of the nodes waits (CHECK_SECONDS)
    "second_jobs": 2,  # in 54 days; a colleague's habit
    "clock_steps": 4,  # in 54 days: a node's clock is hours off after a reboot
}
KINDS = {
    # what happens: (of 419, does the node leave, seconds until the step has ended)
    "a GPU, its memory or its board fails": (148 + 72 + 19 + 17 + 6, True, 60.0),  # the process sees an error and ends
    "a host fails": (32 + 3 + 3 + 2 + 2 + 2 + 2, True, 210.0),  # no heartbeat for 180 s, looked at every 15 s, twice
    "the network fails": (35 + 7 + 7, True, 930.0),  # nothing moves: guard.hang_seconds and the reports
    "software fails": (54 + 2, False, 60.0),
    "data are corrupted in silence": (6, True, 60.0),  # replicas differ: the last checkpoint may hold it already
}
FULL = "run_dir is full, and a rank dies of it"
SECOND, STEP = "a second job is submitted by mistake", "a node's clock steps"


ENCODERS = ("IMAGE_PRETRAINED", "AUDIO_PRETRAINED")
"""What the script asks a site for; empty files here."""
STAND_INS = {
    # The check before a start: it finds nothing, but another job that is at work in the same run_dir.
    "python": '[ "$SLURM_JOB_ID" = 1 ] || {{ echo "error: being written by job 1"; exit 2; }}\n',
    "srun": 'exec {python} {own} --srun {at} "$@"\n',
    "squeue": 'case "$*" in *%N*) echo nodes;; esac\n',
    "scontrol": 'case "$*" in *hostnames*) cat {at}/nodes;; requeue*) touch {at}/requeued;; esac\n',
    "sinfo": "for n in $(seq {pool}); do echo node$n mix; done\n",
    "scancel": "exit 0\n",
    # 15 s are the watchdog's, which is ended with its step; with the first 2 s after a requeue SLURM ends the script.
    "sleep": """\
case "$1" in
  15) exec /bin/sleep 15 ;;
  2) [ ! -e {at}/requeued ] || kill -9 $PPID ;;
  *) exec {python} {own} --sleep {at} "$1" ;;
esac
""",
}


class World:
    """The clock, the nodes and what is to come, in a file that all the stand-ins share."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "world.json"
        self.__dict__.update(json.loads(self.path.read_text()) if self.path.exists() else {})

    def save(self) -> None:
        """Write everything back."""
        kept = {key: value for key, value in self.__dict__.items() if key != "path"}
        self.path.write_text(json.dumps(kept))
        (self.path.parent / "uptime").write_text(f"{self.clock:.0f} 0\n")

    def count(self, kind: str) -> None:
        """Note that something has happened."""
        self.seen[kind] = self.seen.get(kind, 0) + 1

    def fit(self, names: list[str]) -> list[str]:
        """Return those of `names` that are not being repaired."""
        return [name for name in names if self.repaired.get(name, 0.0) <= self.clock]


def trace() -> list[dict]:
    """Return what happens when, in seconds from the start: faults as a Poisson process, and what is planned."""
    chance = random.Random(SEED)
    end = DAYS * 86_400.0
    rate = sum(count for count, _, _ in KINDS.values()) / end * 1_024 / 16_384
    events, now = [], chance.expovariate(rate)
    while now < end:
        kind = chance.choices(list(KINDS), [count for count, _, _ in KINDS.values()])[0]
        events.append({"at": now, "kind": kind, "place": chance.randrange(TRAIN_NODES)})
        now += chance.expovariate(rate)
    events += [{"at": (number + 0.5) * end / 47, "kind": "planned", "place": 0} for number in range(47)]
    for kind, name in ((FULL, "full_storages"), (SECOND, "second_jobs"), (STEP, "clock_steps")):
        events += [
            {"at": chance.uniform(0.0, end), "kind": kind, "place": chance.randrange(TRAIN_NODES)}
            for _ in range(ASSUMED[name])
        ]
    return sorted(events, key=lambda event: event["at"])


def commit_step(checkpoints: Path, step: int, fence: Fence) -> None:
    """Make a checkpoint as the trainer does, of one small shard."""
    partial = checkpoints / f"step_{step:08d}.{fence.token}.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_text(str(step))
    final = checkpoints / f"step_{step:08d}"
    commit(partial, final, hashes={}, facts={"step": step}, fence=fence)
    remove_old(checkpoints, keep=3, keep_every=0)


def resume_step(checkpoints: Path) -> int:
    """Return the step of the newest whole checkpoint, as the trainer chooses it; damaged ones are set aside."""
    for path in reversed(whole_ones(checkpoints)):
        if not find_damage(path):
            return step_of(path)
        set_aside(path, "damaged")
    return 0


def train(world: World, run_dir: Path) -> int:
    """Train from the newest checkpoint to the next event; return the status that srun would have."""
    checkpoints = run_dir / "checkpoints"
    fence = Fence.take(checkpoints)
    step = resume_step(checkpoints)
    world.clock += ASSUMED["start_seconds"] + ASSUMED["load_seconds"]
    if random.Random(f"{SEED} read {world.tries}").random() < ASSUMED["passing_read_errors"]:
        world.count("a read error that passes at a resume")
        world.clock += ASSUMED["read_retry_seconds"]
    while world.events and world.events[0]["kind"] in (SECOND, STEP):
        pass_over(world, world.events.pop(0), run_dir)
    per_save = world.interval * world.step_seconds + ASSUMED["save_stall_seconds"]
    warning = world.life_began + ASSUMED["life_seconds"] - ASSUMED["margin_seconds"]
    event = world.events[0] if world.events else {"at": DAYS * 86_400.0, "kind": "end", "place": 0}
    until = min(event["at"], warning, DAYS * 86_400.0)
    asked = event["kind"] == "planned" or until < event["at"]
    gone = max(0.0, until - world.clock)  # of training, in this try
    saves = int((gone - (0.0 if asked else ASSUMED["save_seconds"])) // per_save) if gone else 0
    done = step + int(gone // per_save) * world.interval
    done += int(min(gone % per_save, per_save - ASSUMED["save_stall_seconds"]) // world.step_seconds)
    saved = [step + number * world.interval for number in range(1, max(0, saves) + 1)]
    world.stalls += len(saved) * ASSUMED["save_stall_seconds"]
    world.clock = max(world.clock, until)
    if asked:
        saved += [done] if done > max([step, *saved]) else []
        world.clock += ASSUMED["planned_seconds"]
    for number in saved[-3:]:  # those before would be removed by now
        commit_step(checkpoints, number, fence)
    kept = max([step, *saved])
    world.lost += (done - kept) * world.step_seconds
    if until >= DAYS * 86_400.0:
        world.kept_steps = kept
        (run_dir / "DONE").write_text(str(kept))
        return 0
    if asked:
        os.kill(world.script, signal.SIGUSR1)  # the warning before the time limit
        if event["kind"] == "planned" and until == event["at"]:
            world.events.pop(0)
        return 0
    world.events.pop(0)
    if event["kind"] == FULL:
        world.full_until = world.clock + ASSUMED["full_seconds"]
    _, leaves, seconds = KINDS.get(event["kind"], (0, False, 60.0))
    (checkpoints / f"step_{done:08d}.{fence.token}.partial").mkdir()  # it dies in the middle of a save, every time
    if event["kind"].startswith("data"):  # found at the next check: the newest checkpoint cannot be trusted
        newest = whole_ones(checkpoints)[-1]
        (newest / "__0_0.distcp").write_text("other")
        world.lost += world.interval * world.step_seconds
    if leaves:
        node = world.fit((run_dir.parent / "nodes").read_text().split())[event["place"]]
        world.repaired[node] = world.clock + ASSUMED["repair_seconds"]
    world.clock += seconds
    world.count(event["kind"])
    for rank in range(8):  # of the node where it happened; those that srun kills leave nothing
        (Path(os.environ["MEGATRON_MM_STATUS_DIR"]) / f"rank_{rank}").write_text(f"75\n{event['kind']}\n")
    return 137


def pass_over(world: World, event: dict, run_dir: Path) -> None:
    """Let happen what costs the run nothing."""
    world.count(event["kind"])
    if event["kind"] == STEP:
        world.off = (run_dir.parent / "nodes").read_text().split()[event["place"]]
    else:
        owner = (run_dir / "checkpoints" / "OWNER").read_text()
        second = subprocess.run(
            ["bash", str(ROOT / "examples" / "pretrain_88b.sh")],
            env={**os.environ, "SLURM_JOB_ID": "2", "SLURM_RESTART_COUNT": "0"},
            capture_output=True,
            text=True,
        )
        assert second.returncode == 1 and "trying again will not help" in second.stdout, second.stdout
        assert owner == (run_dir / "checkpoints" / "OWNER").read_text()


def srun(arguments: list[str], folder: Path) -> int:
    """Be srun: of the nodes' checks, or of training."""
    world, status = World(folder), 0
    if "--job-name=train" in arguments:
        world.tries += 1
        status = train(world, folder / "run")
    else:
        slow = random.Random(f"{SEED} prolog {world.lives}").random() < ASSUMED["slow_prologs"]
        if slow and world.lives not in world.slow_lives:
            world.slow_lives.append(world.lives)
            world.count("a slow prolog on all nodes")
            world.clock += CHECK_SECONDS  # then the check is ended; the prolog is over when it comes again
            world.ready = world.clock - CHECK_SECONDS + ASSUMED["prolog_seconds"]
            status = 124
        else:
            world.clock = max(world.clock, world.ready) + ASSUMED["check_seconds"]
            check_nodes(world, (folder / "nodes").read_text().split())
    world.save()
    return status


def check_nodes(world: World, nodes: list[str]) -> None:
    """Say of each node what examples/check_node.sh would."""
    fit, full = set(world.fit(nodes)), world.clock < world.full_until
    for node in nodes:
        print(node, "clock", int(time.time()) - (7_200 if node == world.off else 0))
        print(
            node, "unfit storage run_dir cannot be written" if full else "fit" if node in fit else "unfit gpus 7 of 8"
        )


def pause(seconds: float, folder: Path) -> int:
    """Be sleep."""
    world = World(folder)
    world.clock += seconds
    world.save()
    return 0


def main() -> int:
    """Run the script until the 54 days are over, and print where the time went."""
    options = _parser().parse_args()
    preset, step_seconds = PRESETS[options.precision], STEP_SECONDS[options.precision]
    interval = options.interval or _preset_interval(preset)
    print(f"{preset}: {step_seconds} s a step, a checkpoint every {interval} steps", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="goodput-"))
    try:
        for name in ENCODERS:
            (folder / name).touch()
        for name, text in STAND_INS.items():
            path = folder / name
            names = {"python": sys.executable, "own": Path(__file__).resolve(), "at": folder, "pool": POOL}
            path.write_text("#!/bin/sh\n" + text.format(**names))
            path.chmod(0o755)
        world = World(folder)
        start = {"clock": 0.0, "events": trace(), "repaired": {}, "life_began": 0.0, "tries": 0, "stalls": 0.0}
        world.__dict__.update({"preset": preset, "step_seconds": step_seconds, "interval": interval})
        world.__dict__.update({**start, "lost": 0.0, "kept_steps": 0, "script": 0, "seen": {}, "lives": 0})
        world.__dict__.update({"full_until": 0.0, "ready": 0.0, "off": "", "slow_lives": []})
        planned = len(world.events)
        world.save()
        while not (folder / "run" / "DONE").exists():
            ended = live(folder)
            world = World(folder)
            assert ended == 0 or (folder / "requeued").exists(), (folder / "out.txt").read_text()[-2_000:]
        total = DAYS * 86_400.0
        goodput = world.kept_steps * world.step_seconds / total
        print(f"{DAYS} days, {planned} interruptions, {world.lives} lives of the job, {world.tries} tries")
        for kind, count in sorted(world.seen.items()):
            print(f"  {count:>3} x {kind}")
        for name, seconds in (("lost steps", world.lost), ("save stalls", world.stalls)):
            print(f"{name:<14}{seconds / 3600:>8.1f} h {seconds / total:>7.2%}")
        rest = total * (1 - goodput) - world.lost - world.stalls
        print(f"{'restarts':<14}{rest / 3600:>8.1f} h {rest / total:>7.2%}")
        line = {"name": "goodput", "ours": round(goodput, 4), "peer": BAR, "ratio": round(goodput / BAR, 4), "bar": 1.0}
        print(json.dumps({**line, "holds": goodput >= BAR}))
        return 0 if goodput >= BAR else 1
    finally:
        shutil.rmtree(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=sorted(PRESETS), default="bf16", help="of the training on H100")
    parser.add_argument("--interval", type=int, default=0, help="steps between checkpoints (default: the preset's)")
    return parser


def _preset_interval(preset: str) -> int:
    from megatron_mm import config as configs  # not at the top: the stand-ins start faster without it

    return configs.load(preset).checkpoint.interval


def live(folder: Path) -> int:
    """Run one life of the job; return how its script ended."""
    world = World(folder)
    world.lives += 1
    world.life_began = world.clock + ASSUMED["queue_seconds"]
    world.clock = world.life_began + ASSUMED["preflight_seconds"]
    (folder / "requeued").unlink(missing_ok=True)
    (folder / "nodes").write_text("\n".join(world.fit([f"node{n}" for n in range(1, POOL + 1)])[:NODES]) + "\n")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": str(world.lives - 1), "SLURM_SUBMIT_DIR": str(ROOT)},
        **{
            "RUN_DIR": str(folder / "run"),
            "TRAIN_DATA": "[data]",
            "PYTHON": str(folder / "python"),
            "PRESET": world.preset,
            "UPTIME_FILE": str(folder / "uptime"),
            "CHECK_SECONDS": str(CHECK_SECONDS),
        },
        **{name: str(folder / name) for name in ENCODERS},
    }
    with (folder / "out.txt").open("a") as out:
        script = subprocess.Popen(
            ["bash", str(ROOT / "examples" / "pretrain_88b.sh")], env=environment, stdout=out, stderr=out
        )
        world.script = script.pid
        world.save()
        try:
            return script.wait()
        finally:
            script.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--srun"]:
        raise SystemExit(srun(sys.argv[3:], Path(sys.argv[2])))
    if sys.argv[1:2] == ["--sleep"]:
        raise SystemExit(pause(float(sys.argv[3]), Path(sys.argv[2])))
    raise SystemExit(main())
