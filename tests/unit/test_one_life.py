"""One life of a job under programs of SLURM's names: what is tried again, who is left out, when it ends for good.

Waiting moves a clock that the stand-ins share; a real SLURM is in tests/slurm.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODES = ("node1", "node2", "node3", "node4", "node5")
STAND_INS = {
    "python": 'cat {at}/preflight 2>/dev/null; exit "$(cat {at}/preflight_status 2>/dev/null || echo 0)"\n',
    "srun": """\
case " $* " in
  *--job-name=train*) echo try >>{at}/tries; . {at}/train ;;
  *) . {at}/check ;;
esac
""",
    "squeue": """\
case "$*" in
  *%N*) echo nodes ;;
  *%r*) cat {at}/reason 2>/dev/null ;;
esac
""",
    "sinfo": 'for node in $(cat {at}/nodes); do echo "$node mix"; done\n',
    "scontrol": """\
case "$1 $2" in
  "show hostnames") cat {at}/nodes ;;
  "show job") echo " ReqNodeList=(null) ExcNodeList=$(cat {at}/excluded 2>/dev/null || echo '(null)')" ;;
  requeue*) touch {at}/requeued ;;
  update*) echo "${{3#ExcNodeList=}}" >>{at}/exclusions ;;
esac
""",
    "scancel": "exit 0\n",
    "sleep": """\
[ "$1" != 2 ] || [ -e {at}/reason ] || kill -9 $PPID  # requeued: SLURM ends the script
read -r up _ <{at}/uptime; echo "$((up + ${{1%.*}})) 0" >{at}/uptime; [ "$1" != 15 ] || exec /bin/sleep 0.1
""",
    "head": '[ ! -e {at}/full ] || exit 1; exec /usr/bin/head "$@"\n',
}
FIT = 'for node in $(cat {at}/nodes); do echo "$node clock $(date +%s)"; echo "$node fit"; done\n'


class Slurm:
    """Runs examples/pretrain_tiny.sh on five nodes, four of which train."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        for name, text in STAND_INS.items():
            (folder / name).write_text("#!/bin/bash\n" + text.format(at=folder))
            (folder / name).chmod(0o755)
        (folder / "nodes").write_text("\n".join(NODES) + "\n")
        (folder / "uptime").write_text("1000 0\n")
        self.check(FIT)
        self.train("exit 1")

    def check(self, script: str) -> None:
        (self.folder / "check").write_text(script.replace("{at}", str(self.folder)))

    def train(self, script: str) -> None:
        (self.folder / "train").write_text(script.replace("{at}", str(self.folder)))

    def run(self, **environment: str) -> str:
        """Return what one life of the job says."""
        given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0", "SLURM_JOB_PARTITION": "batch"}
        given |= {"SLURM_JOB_NUM_NODES": "4", "SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(self.run_dir)}
        given |= {"PYTHON": str(self.folder / "python"), "UPTIME_FILE": str(self.folder / "uptime")}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        ended = subprocess.run(
            ["bash", str(ROOT / "examples" / "pretrain_tiny.sh")],
            env={**clean, **given, "PATH": f"{self.folder}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
        )  # fmt: skip
        self.status = ended.returncode
        return ended.stdout

    def tries(self) -> int:
        return len(self.lines("tries"))

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def waited(self) -> int:
        """Return the seconds of the clock that the stand-ins share."""
        return int((self.folder / "uptime").read_text().split()[0]) - 1000

    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def ends_with(**ranks: str) -> str:
    """Return a step whose ranks leave these status files; rank 0 was killed."""
    lines = [f"printf '{text}' >\"$MEGATRON_MM_STATUS_DIR/{rank}\"" for rank, text in ranks.items()]
    return "\n".join([*lines, "exit 137"])


@pytest.mark.parametrize(
    ("ranks", "tries", "said"),
    [
        ({"rank_1": "2\\nerror: give model.heads=4"}, 1, "trying again will not help: give model.heads=4"),
        ({"rank_1": "3\\nerror: /a/b is damaged", "rank_2": "75\\nlost"}, 1, "trying again will not help: /a/b is dam"),
        ({"rank_1": "2\\nerror: x", "rank_3": "4\\nTakenOver: job 9"}, 1, "this one ends for good: TakenOver: job 9"),
        ({"rank_1": "75\\nOSError: gone", "rank_2": "75\\nOSError: gone"}, 3, "2 ranks ended with 75: OSError: gone"),
        ({"rank_1": "1\\nTraceback\\nerror: in it"}, 3, "3 tries in a row have saved nothing new"),
        ({"rank_1": "86\\nnothing has moved", "rank_2.partial": "2\\n"}, 3, "1 ranks ended with 86: nothing has moved"),
        ({}, 3, "3 tries in a row have saved nothing new"),
    ],
    ids=str,
)
def test_the_ranks_status_files_say_whether_it_is_tried_again(
    slurm: Slurm, ranks: dict[str, str], tries: int, said: str
) -> None:
    slurm.train('echo "error: this is a line of a log" >&2\n' + ends_with(**ranks))
    text = slurm.run()
    assert (slurm.status, slurm.tries(), slurm.requeued()) == (1, tries, False), text
    assert said in text


@pytest.mark.parametrize("status", [2, 3])
def test_a_mistake_ends_the_job_before_any_node_is_asked(slurm: Slurm, status: int) -> None:
    """In a chain of jobs each one ends so; a heartbeat of another job's that lives is such a mistake."""
    other = slurm.run_dir / "health" / "rank_0.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"rank": 0, "job": "6"}))
    (slurm.folder / "preflight").write_text("error: no checkpoint is whole\n")
    (slurm.folder / "preflight_status").write_text(str(status))
    for job in ("7", "8"):
        text = slurm.run(SLURM_JOB_ID=job)
        assert slurm.status == 1 and "trying again will not help: no checkpoint is whole" in text
    assert not slurm.tries() and not slurm.requeued() and other.exists()


def test_heartbeats_of_another_job_stay_and_those_of_this_one_are_removed(slurm: Slurm) -> None:
    folder = slurm.run_dir / "health"
    folder.mkdir(parents=True)
    for rank, job in ((0, "7"), (1, "70"), (2, None)):
        (folder / f"rank_{rank}.json").write_text(json.dumps({"rank": rank, "job": job}))
    slurm.train(ends_with(rank_0="2\\n"))
    slurm.run()
    assert sorted(path.name for path in folder.iterdir()) == ["rank_1.json", "rank_2.json"]


@pytest.mark.parametrize(("owner", "tries"), [("7.0.node1.abc", 5), ("8.0.node9.abc", 3), ("7.1.node9.abc", 0)])
def test_what_another_job_saves_is_no_progress_of_this_one(slurm: Slurm, owner: str, tries: int) -> None:
    """Two tries save something; a life that SLURM has given up does not try at all."""
    (slurm.run_dir / "checkpoints").mkdir(parents=True)
    (slurm.run_dir / "checkpoints" / "OWNER").write_text(owner)
    slurm.train(
        "n=$(wc -l <{at}/tries); s=$RUN_DIR/checkpoints/step_$n; [ $n -gt 2 ] || { mkdir $s; : >$s/COMMITTED; }; exit 9"
    )
    text = slurm.run()
    assert (slurm.status, slurm.tries()) == (1, tries), text


UNFIT = (
    'for node in $(cat {at}/nodes); do case $node in %s) echo "$node unfit %s" ;; *) echo "$node fit" ;; esac; done\n'
)
FULL_STORAGE = UNFIT % ("*", "storage the run_dir cannot be written from here")


def test_a_node_that_fails_alone_is_left_out(slurm: Slurm) -> None:
    (slurm.folder / "excluded").write_text("node8")  # by whoever submitted the job
    slurm.check(UNFIT % ("node2", "shm /dev/shm is full"))
    (slurm.folder / "nodes").write_text("node1\nnode2\nnode3\nnode4\n")
    (slurm.folder / "sinfo").write_text("#!/bin/sh\nfor n in 1 2 3 4 5 6; do echo node$n idle; done\n")
    text = slurm.run()
    assert "node2 is unfit: /dev/shm is full" in text
    assert slurm.requeued() and not slurm.tries() and slurm.lines("exclusions") == ["node8,node2"], text


@pytest.mark.parametrize("down", ["", "down*", "drain"])
def test_no_exclusion_leaves_fewer_nodes_than_the_job_needs(slurm: Slurm, down: str) -> None:
    slurm.check(UNFIT % ("node2", "shm /dev/shm is full"))
    (slurm.folder / "nodes").write_text("node1\nnode2\nnode3\nnode4\n")
    other = f"echo node5 {down}; echo node6 {down}" if down else ":"
    (slurm.folder / "sinfo").write_text(f"#!/bin/sh\nfor n in 1 2 3 4; do echo node$n mix; done; {other}\n")
    text = slurm.run()
    assert slurm.requeued() and not slurm.lines("exclusions"), text
    assert 600 <= slurm.waited() < 700


@pytest.mark.parametrize("script", [FULL_STORAGE, UNFIT % ("node[12]", "tmp /tmp is full"), "exit 1\n"], ids=str)
def test_a_common_cause_is_waited_for_and_excludes_nobody(slurm: Slurm, script: str) -> None:
    slurm.check(script)
    text = slurm.run()
    assert "nodes fail the same check" in text and "waited 10 minutes for this to pass" in text
    assert slurm.requeued() and not slurm.lines("exclusions") and not slurm.tries()
    assert 600 <= slurm.waited() < 700


def test_a_common_cause_that_passes_is_the_end_of_it(slurm: Slurm) -> None:
    slurm.check("echo . >>{at}/n; if [ $(wc -l <{at}/n) -gt 4 ]; then " + FIT.strip() + f"; exit; fi\n{FULL_STORAGE}")
    slurm.train(ends_with(rank_1="3\\nerror: the end"))
    text = slurm.run()
    assert "the end" in text and slurm.tries() == 1 and not slurm.requeued()


def test_an_exclusion_with_which_the_job_cannot_run_is_lifted(slurm: Slurm) -> None:
    slurm.check(UNFIT % ("node2", "shm /dev/shm is full"))
    (slurm.folder / "nodes").write_text("node1\nnode2\nnode3\nnode4\n")
    (slurm.folder / "sinfo").write_text("#!/bin/sh\nfor n in 1 2 3 4 5 6; do echo node$n idle; done\n")
    (slurm.folder / "reason").write_text("BadConstraints")
    assert "it cannot run without node2: nobody is excluded" in slurm.run()
    assert slurm.lines("exclusions") == ["node2", ""]


def test_a_clock_that_is_off_is_said_and_a_slow_start_of_the_step_is_no_skew(slurm: Slurm) -> None:
    answer = "; for node in $(cat {at}/nodes); do echo $node clock $%s; echo $node fit; done\n"
    slurm.check("/bin/sleep 1.2; now=$(date +%s); /bin/sleep 1.2" + answer % "now")
    slurm.train(ends_with(rank_1="3\\nerror: the end"))
    assert "clock" not in slurm.run(SKEW_SECONDS="1")
    slurm.check("now=$(date +%s)" + answer % "((now - 7200 * (${node#node} == 3)))")
    text = slurm.run()
    assert re.search(r"warning: the clock of node3 is off by -7[12]\d\d s", text), text
    assert text.count("clock of") == 1 and "5 of 5 nodes are fit" in text


BEATING = """\
cd "$RUN_DIR" && mkdir -p health && cd health
for beat in {1..50}; do
  /bin/sleep 0.05
  [ {what} != full ] || [ $beat != 5 ] || touch {at}/full
  [ $beat -lt 45 ] || rm -f {at}/full
  [ ! -e {at}/full ] || continue
  echo $beat >rank_0.json
  [ {what} = dead ] && [ $beat -gt 5 ] || echo $beat >rank_1.json
  touch -d 2001-01-01 rank_*.json
done
"""


@pytest.mark.parametrize("what", ["moves", "dead", "full"])
def test_a_rank_is_silent_if_its_heartbeat_stands_still_and_storage_does_not(slurm: Slurm, what: str) -> None:
    """Wall clocks say nothing: `date` and the files' times are of other days. A full disk stops all heartbeats."""
    (slurm.folder / "date").write_text('#!/bin/bash\nexec /bin/date -d "$RANDOM minutes ago" "$@"\n')
    (slurm.folder / "date").chmod(0o755)
    slurm.train(BEATING.replace("{what}", what) + ends_with(rank_0="3\\nerror: the end"))
    text = slurm.run(SILENT_SECONDS="3000" if what == "moves" else "180", MAX_STALLS="1")
    assert ("no heartbeat of rank 1: ending the step" in text) == (what == "dead"), text
    assert ("cannot be written from here either: nobody is blamed" in text) == (what == "full"), text
    assert ("the end" in text) == (what != "dead"), text


def test_a_run_dir_that_is_full_at_the_start_is_waited_for(slurm: Slurm) -> None:
    (slurm.folder / "full").touch()
    text = slurm.run()
    assert "run cannot be written" in text and slurm.requeued() and not slurm.tries()
    (slurm.folder / "requeued").unlink()
    (slurm.folder / "blocked").touch()
    text = slurm.run(RUN_DIR=str(slurm.folder / "blocked" / "run"))
    assert "Not a directory" in text and not slurm.requeued() and slurm.status == 1


def start_rank(folder: Path, **given: str) -> dict[str, str]:
    """Return the environment that examples/start_rank.sh gives to a rank, /tmp being `folder`."""
    text = (ROOT / "examples" / "start_rank.sh").read_text().replace("/tmp/", f"{folder}/")
    (folder / "start_rank.sh").write_text(text)
    show = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    ended = subprocess.run(
        ["bash", str(folder / "start_rank.sh"), *show],
        env={"PATH": os.environ["PATH"], "SLURM_PROCID": "3", "SLURM_LOCALID": "1", **given},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(ended.stdout)


@pytest.mark.parametrize("planted", [None, "open to all", "of another user", "a link", "a file"])
def test_compiled_code_is_loaded_from_a_private_folder(planted: str | None, tmp_path: Path) -> None:
    name = tmp_path / f"triton-{os.getuid()}"
    if planted in ("open to all", "of another user"):
        name.mkdir(mode=0o700)
        os.chmod(name, 0o777 if planted == "open to all" else 0o700)
        if planted == "of another user":
            if os.geteuid():
                pytest.skip("only root can give a folder to another user")
            os.chown(name, 12345, 12345)
    elif planted == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "elsewhere")
    elif planted == "a file":
        name.touch()
    found = start_rank(tmp_path)
    for key in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(found[key])
        assert folder.parent == tmp_path and not folder.is_symlink() and list(folder.iterdir()) == []
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
    assert (found["TRITON_CACHE_DIR"] == str(name)) == (planted is None)
    assert start_rank(tmp_path, TRITON_CACHE_DIR="/site/chose")["TRITON_CACHE_DIR"] == "/site/chose"


def test_a_rank_gets_its_number_and_a_deadline_on_the_clock_of_its_node(tmp_path: Path) -> None:
    (tmp_path / "date").write_text("#!/bin/sh\necho 5000\n")
    (tmp_path / "date").chmod(0o755)
    found = start_rank(tmp_path, SECONDS_TO_TRAIN="600", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (found["RANK"], found["LOCAL_RANK"], found["MEGATRON_MM_DEADLINE"]) == ("3", "1", "5600")
