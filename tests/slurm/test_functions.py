"""The functions of slurm/common.sh on their own, with programs of SLURM's that fail on demand."""

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.trainer_fixtures import ROOT

ELEMENT = {"SLURM_JOB_ID": "50", "SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": "4"}
RECORDS = {
    "job": "JobId=50 JobName=x JobState={}",
    # For the element that has the number of the array SLURM shows all elements.
    "element": "JobId=50 ArrayJobId=50 ArrayTaskId=4 JobState={}\n"
    "JobId=51 ArrayJobId=50 ArrayTaskId=1 JobState=COMPLETED",
}
# Every verb fails as often as the file named by it has lines.
SCONTROL = """
verb=$1; [ "$verb" != --oneliner ] || verb=$2
echo "$verb" "${@: -1}" >>"$FOLDER/calls"
if [ -s "$FOLDER/$verb" ]; then
  sed -i 1d "$FOLDER/$verb"
  echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
  exit 1
fi
[ "$verb" != show ] || printf '%s\\n' "$RECORD"
"""


def shell(
    folder: Path, script: str, *arguments: str, programs: Mapping[str, str] = {}, **extra: str
) -> "subprocess.CompletedProcess[str]":
    """Sources common.sh and runs `script`; `programs` stand in for those of the machine."""
    for name, text in programs.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.run(
        ["bash", "-c", f"source slurm/common.sh || exit 9\n{script}", "job", *arguments],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=60,
        env=inherited | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FOLDER": str(folder),
            "SITE_ENV": "none", **extra,
        },
    )  # fmt: skip


def conclude(
    folder: Path,
    record: str,
    sleep: str = "",
    variables: Mapping[str, str] = ELEMENT,
    code: int = 75,
    **failures: int,
) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    """Ends a job whose tasks left with `code`; gives what it said, and what it asked of SLURM."""
    for verb, times in failures.items():
        (folder / verb).write_text("\n" * times)
    programs = {"scontrol": SCONTROL, "sleep": sleep, "sinfo": 'echo "$NODES"'}
    script = f"stopped=${{STOPPED:-}}; identify; run_folder=$FOLDER/run; conclude {code}"
    result = shell(folder, script, programs=programs, RECORD=record, **variables)
    return result, (folder / "calls").read_text().splitlines()


USR1, TERM, AGAIN = {"STOPPED": "USR1"}, {"STOPPED": "TERM"}, {"SLURM_RESTART_COUNT": "1"}
LOST = {"NODES": "n1 alloc\nn2 down*\nn2 down*"}


@pytest.mark.parametrize(
    ("code", "variables", "ends_with", "said", "requeued"),
    [
        (75, {}, 75, "requeued: saved", True),
        (0, {}, 75, "requeued: srun reports success, but the run is not finished", True),
        (138, USR1, 75, "requeued: stopped before the tasks could listen", True),
        (143, USR1, 75, "requeued: stopped before the tasks could listen", True),
        (138, {}, 138, "not requeued: exit code 138, see the lines above", False),
        (73, AGAIN, 73, "requeued: exit code 73, the run folder cannot be written or is in", True),
        (73, {}, 73, "not requeued: exit code 73", False),
        (137, {}, 137, "not requeued: exit code 137, a task was killed by SIGKILL (out", False),
        (137, LOST, 137, "requeued: a node was lost (n2)", True),
        (69, LOST, 69, "requeued: a node was lost (n2)", True),
        (69, {"NODES": "n1 alloc\nn2 alloc*"}, 69, "requeued: a node was lost (n2)", True),
        (137, {**LOST, "SLURMD_NODENAME": "n2"}, 137, "not requeued: exit code 137", False),
        (137, TERM, 137, "killed before it could save (is KillWait too short?)); SLURM", False),
        (143, TERM, 143, "ended before all was saved (exit code 143", False),
        (0, TERM, 75, "the run is not finished: SLURM lost its tasks; SLURM decides", False),
        (2, {}, 2, "not requeued: exit code 2, bad configuration", False),
    ],
)
def test_what_goes_on_is_requeued(
    tmp_path: Path, code: int, variables: Mapping[str, str], ends_with: int, said: str,
    requeued: bool,
) -> None:  # fmt: skip
    record = RECORDS["element"].format("RUNNING")
    result, calls = conclude(tmp_path, record, variables={**ELEMENT, **variables}, code=code)
    assert result.returncode == ends_with
    assert said in result.stdout + result.stderr
    assert ("requeue 50_4" in calls) is requeued
    assert "finished" not in result.stdout.replace("not finished", "")


def test_a_run_is_finished_when_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").touch()
    result, calls = conclude(tmp_path, RECORDS["element"].format("RUNNING"), code=0)
    assert result.returncode == 0
    assert "requeue 50_4" not in calls
    assert f"finished: {tmp_path}/run" in result.stdout


def test_a_requeue_that_cannot_be_counted_is_none(tmp_path: Path) -> None:
    """A full or read-only disk would burn the allocation for ever."""
    (tmp_path / "run").touch()
    result, calls = conclude(tmp_path, RECORDS["element"].format("RUNNING"))
    assert result.returncode == 73
    assert f"{tmp_path}/run/requeues, which counts the requeues, cannot be written" in result.stderr
    assert not any(call.startswith("requeue") for call in calls)


def test_a_job_that_may_not_be_requeued_says_so_at_once(tmp_path: Path) -> None:
    record = RECORDS["element"].format("RUNNING Requeue=0 Restarts=0")
    result, calls = conclude(tmp_path, record, sleep="exit 1")
    assert result.returncode == 75
    assert (
        "this job may not be requeued (--no-requeue, or the site's JobRequeue=0)" in result.stderr
    )
    assert "saved, but SLURM does not requeue this job" in result.stderr
    assert not any(call.startswith("requeue") for call in calls)


# Ends with code 75 at the second signal.
DEAF_AT_FIRST = """
trap 'n=$((${n:-0} + 1)); [ $n -lt 2 ] || exit 75' USR1
touch "$FOLDER/started"; while :; do /bin/sleep 0.05; done
"""


# Notes what it starts; a doctor that is warned of the time limit meanwhile ends by the signal.
SRUN = """
echo "$*" | grep -o -e '-m trainer.doctor' -e 'trainer/run.py' >>"$FOLDER/runs"
case $* in *doctor*)
  [ -z "${WARNED:-}" ] || { kill -USR1 $PPID; exec /bin/sleep 9; }
  exit "$BAD" ;;
esac
"""


@pytest.mark.parametrize(
    ("variables", "code", "runs"),
    [
        ({}, 0, ["trainer/run.py"]),
        ({"DOCTOR": "0"}, 0, ["trainer/run.py"]),
        ({"DOCTOR": "1"}, 0, ["-m trainer.doctor", "trainer/run.py"]),
        ({"DOCTOR": "1", **AGAIN}, 0, ["trainer/run.py"]),
        ({"DOCTOR": "1", "BAD": "73"}, 73, ["-m trainer.doctor"]),
        ({"DOCTOR": "1", "WARNED": "yes"}, 75, ["-m trainer.doctor"]),
    ],
)
def test_the_doctor_comes_before_the_first_start(
    tmp_path: Path, variables: Mapping[str, str], code: int, runs: list[str]
) -> None:
    script = "settings=(); doctor; launch trainer/run.py"
    programs = {"srun": SRUN, "sleep": "exit 1"}
    result = shell(tmp_path, script, programs=programs, **{"BAD": "0", **variables})
    assert result.returncode == code, result.stderr
    assert (tmp_path / "runs").read_text().splitlines() == runs
    refused = "not started: the doctor ended with code 73, see its table above; not requeued. DOC"
    assert (refused in result.stderr) is (code == 73)


def test_a_warning_that_srun_swallowed_comes_again(tmp_path: Path) -> None:
    script = """
    (until [ -e "$FOLDER/started" ]; do /bin/sleep 0.05; done; kill -USR1 $$) &
    attend deaf; echo "code $?"; child=; warned"""
    programs = {"deaf": DEAF_AT_FIRST, "sleep": "exec /bin/sleep 0.3"}
    result = shell(tmp_path, script, programs=programs)
    assert "code 75\n" in result.stdout
    said = [line.partition("slurm: ")[2] for line in result.stdout.splitlines()]
    assert [line for line in said if line] == [
        "SIGUSR1: forwarded to the tasks", "SIGUSR1: nothing runs yet that could save",
    ]  # fmt: skip


# Instead of Python: writes for ever at first, then a set.
WRITER = """
echo "$*" >>"$FOLDER/words"
case $* in *--verify*) exit 0 ;; esac
if [ ! -e "$FOLDER/started" ]; then touch "$FOLDER/started"; while :; do /bin/sleep 0.05; done; fi
"""


def test_shards_are_written_on_after_the_time_limit(tmp_path: Path) -> None:
    variables = {
        "SLURM_JOB_ID": "50",
        "SLURM_CPUS_PER_TASK": "3",
        "RECORD": "JobId=50 JobState=RUNNING",
    }
    programs = {"scontrol": SCONTROL, "sinfo": "", "sleep": "", "writer": WRITER}
    script = """
    (until [ -e "$FOLDER/started" ]; do /bin/sleep 0.05; done; kill -USR1 $$) &
    source slurm/make_shards.sh"""
    for code, said in ((75, "requeued: stopped before"), (0, f"finished: {tmp_path}/set")):
        result = shell(
            tmp_path, script, "--dataset=x", f"--out={tmp_path}/set", PYTHON="writer",
            programs=programs, **variables,
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        assert f"slurm: {said}" in result.stdout
        script = "source slurm/make_shards.sh"
    write = f"-u -m shards.writer --jobs 3 --dataset=x --out={tmp_path}/set"
    verify = f"-u -m shards.writer --jobs 3 --out {tmp_path}/set --verify"
    assert (tmp_path / "words").read_text().splitlines() == [write, write, verify]
    assert not (tmp_path / "set.requeues").exists()


SITES = {
    "exit": ("A=1\nexit 0\n", "its exit ends the job, too; use return"),
    "CRLF": ("A=1\r\n", "has the line ends of Windows; sed -i 's/\\r$//'"),
    "no module": ("module purge && module load cuda\n", "there is no 'module' on"),
    "a failing module": (
        "module() { return 3; }\nmodule load cuda\n",
        "line 2, 'module load cuda', failed with code 3; without its software nothing starts",
    ),
    "no conda": ("source /nowhere/conda.sh\n", "line 1, 'source /nowhere/conda.sh', failed with"),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_env_that_would_mislead_the_job_ends_it(tmp_path: Path, name: str) -> None:
    text, said = SITES[name]
    site = tmp_path / "site.env"
    site.write_bytes(text.encode())
    result = shell(tmp_path, "echo never", SITE_ENV=str(site))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"SITE_ENV = {site}: {said}" in result.stderr


def test_a_site_env_may_go_elsewhere_and_fail_in_part(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("set -e\ncd /\nls /nowhere 2>/dev/null\nmodule() { :; }\nmodule load x\nA=1\n")
    script = 'echo "$A in $PWD"; false; echo "$?"'
    result = shell(tmp_path, script, SITE_ENV=str(site))
    assert result.stdout == f"1 in {ROOT}\n1\n"
    assert "line 3, 'ls /nowhere 2>/dev/null', failed with code 2; the job goes on" in result.stderr


@pytest.mark.parametrize("template", sorted(p.name for p in ROOT.glob("slurm/[!c]*.sh")))
def test_a_template_says_where_it_can_work(tmp_path: Path, template: str) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "slurm" / template)], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "SLURM_JOB_ID": "50"},
    )  # fmt: skip
    assert result.returncode == 2
    assert f"submit from the root of the repository, not {tmp_path}, or give" in result.stderr


@pytest.mark.parametrize(
    ("record", "variables", "job"),
    [
        ("job", {"SLURM_JOB_ID": "50"}, "50"),
        ("element", ELEMENT, "50_4"),
        # sbatch hands on the variables of an array element that submits another job.
        ("job", ELEMENT | {"SLURM_ARRAY_JOB_ID": "17"}, "50"),
    ],
)
def test_a_job_requeues_itself_alone(
    tmp_path: Path, record: str, variables: Mapping[str, str], job: str
) -> None:
    text = RECORDS[record].format("RUNNING")
    result, calls = conclude(tmp_path, text, variables=variables)
    assert result.returncode == 75
    assert "slurm: requeued" in result.stdout, result.stderr
    assert calls[-1] == f"requeue {job}"


def test_a_busy_slurmctld_is_asked_again(tmp_path: Path) -> None:
    text = RECORDS["element"].format("RUNNING")
    result, calls = conclude(tmp_path, text, show=3, requeue=3)
    assert "slurm: requeued" in result.stdout, result.stderr
    assert calls.count("requeue 50_4") == 4


def test_a_slurmctld_that_never_answers_decides_nothing(tmp_path: Path) -> None:
    result, calls = conclude(tmp_path, "", show=99, requeue=99)
    assert "SLURM decides" not in result.stderr
    assert "saved, but SLURM does not requeue this job, see the lines above" in result.stderr
    assert "'scontrol requeue 50_4' or the same sbatch command continues" in result.stderr
    assert calls.count("requeue 50_4") == 5


def test_what_slurm_ends_is_not_requeued(tmp_path: Path) -> None:
    result, calls = conclude(tmp_path, RECORDS["element"].format("COMPLETING"))
    assert "saved; SLURM decides whether this job (state COMPLETING) runs again" in result.stderr
    assert not any(call.startswith("requeue") for call in calls)


def test_a_job_cancelled_between_two_tries_is_not_requeued(tmp_path: Path) -> None:
    text = RECORDS["element"].format("RUNNING")
    result, calls = conclude(tmp_path, text, sleep="kill -TERM $PPID", requeue=99)
    assert "saved; SLURM decides" in result.stderr
    assert calls.count("requeue 50_4") == 1


@pytest.mark.parametrize(
    "line",
    [
        "export NEW=/opt/x:$NEVER_SET_BY_ANYBODY",
        "NEW=/opt/x: ; [ -d /nowhere ] && SCRATCH=/nowhere",
    ],
)
def test_site_env_is_read_as_a_login_shell_reads_it(tmp_path: Path, line: str) -> None:
    site = tmp_path / "site.env"
    site.write_text(f"{line}\n")
    result = shell(tmp_path, 'echo "$NEW"; echo "$UNSET"; echo never', SITE_ENV=str(site))
    assert result.stdout == "/opt/x:\n", result.stderr
    assert "UNSET: unbound variable" in result.stderr


@pytest.mark.parametrize("text", [None, "if true; then\n"])
def test_a_site_env_that_is_missing_or_wrong_is_refused(tmp_path: Path, text: str | None) -> None:
    site = tmp_path / "site.env"
    if text is not None:
        site.write_text(text)
    result = shell(tmp_path, "echo never", SITE_ENV=str(site))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"SITE_ENV = {site}: cannot be read as a bash script" in result.stderr


def staged(folder: Path, root: Path, *given: str) -> tuple[str, dict[str, str]]:
    """What `stage` says of the set in `root`, and the settings that a run then has."""
    script = 'settings=("$@"); stage >"$FOLDER/said"; printf "%s\\n" "${settings[@]}"'
    scratch = str(folder / "scratch")
    arguments = ["--data.root", str(root), *given]
    result = shell(folder, script, *arguments, STAGE="yes", SCRATCH=scratch, LC_ALL="C")
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    return (folder / "said").read_text(), dict(zip(words[::2], words[1::2], strict=True))


def test_a_staged_set_is_read_by_any_shell_and_fits_its_cache(tmp_path: Path) -> None:
    root = tmp_path / "it's a sët"
    root.mkdir()
    (root / "index.json").write_text("read")
    with (root / "holes.tar").open("wb") as file:  # many bytes in few blocks, as compressed
        file.truncate(3 * 2**30)
    said, settings = staged(tmp_path, root)
    assert settings["--data.cache_gib"] == "6"  # rounded up, and two to spare
    assert settings["--data.cache_dir"].startswith(f"{tmp_path}/scratch/moa-shards-")
    assert f"staging {root} to {settings['--data.cache_dir']} on every node, at most 6 GiB" in said
    command = settings["--data.root"].removeprefix("pipe:").replace("{}", shlex.quote("index.json"))
    assert subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout == b"read"


def test_settings_of_the_user_win_over_those_of_staging(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    given = ["--data.cache_gib", "7", "--data.cache_dir", "/fast"]
    said, settings = staged(tmp_path, tmp_path / "set", *given)
    assert (settings["--data.cache_gib"], settings["--data.cache_dir"]) == ("7", "/fast")
    assert "to /fast on every node, at most 7 GiB" in said


@pytest.mark.parametrize("name", ["data.exclude_list", "data.include_list"])
def test_a_set_with_a_list_of_samples_is_not_staged(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    said, settings = staged(tmp_path, tmp_path / "set", f"--{name}", "a.txt")
    assert settings == {"--data.root": str(tmp_path / "set"), f"--{name}": "a.txt"}
    assert f"not staged, read from {tmp_path / 'set'}: {name} = a.txt may name samples" in said
