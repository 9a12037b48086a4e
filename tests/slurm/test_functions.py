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
REQUEUE = "identify; run_folder=$FOLDER/run; conclude 75"
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
    **failures: int,
) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    """Ends a job whose tasks have saved; gives what it said, and what it asked of SLURM."""
    for verb, times in failures.items():
        (folder / verb).write_text("\n" * times)
    programs = {"scontrol": SCONTROL, "sleep": sleep}
    result = shell(folder, REQUEUE, programs=programs, RECORD=record, **variables)
    assert result.returncode == 75, result.stderr
    return result, (folder / "calls").read_text().splitlines()


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
