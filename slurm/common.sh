# shellcheck shell=bash
# What the templates share: site settings, rendezvous, plan, launch, and how a job ends or requeues.
# Sourced from SLURM_SUBMIT_DIR, since sbatch runs a copy of the script.
set -uo pipefail

readonly FINISHED=0 BAD_CONFIGURATION=2 RESUBMIT=75

say() { printf '%s slurm: %s\n' "$(date '+%F %T')" "$*"; }

die() { # CODE MESSAGE
  say "$2" >&2
  exit "$1"
}

# What another launcher left in the shell of sbatch would tell every task that it is somebody else.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

# The only file a site edits; see site.env.example for what it may set.
site=${SITE_ENV:-slurm/site.env}
if [ "$site" != none ] && { [ -e "$site" ] || [ -n "${SITE_ENV:-}" ]; }; then
  bash -n "$site" || die "$BAD_CONFIGURATION" "SITE_ENV = $site: cannot be read as a bash script, \
see the line above; mend it, name another file, or give SITE_ENV=none for none"
  ! grep -q $'\r' "$site" || die "$BAD_CONFIGURATION" "SITE_ENV = $site: has the line ends of \
Windows; sed -i 's/\\r\$//' $site takes them away"
  site_failed() { # CODE LINE
    local what
    # `source` repeats the code of the last line, which may well be false.
    [ "${BASH_SOURCE[1]}" = "$site" ] || return 0
    what="SITE_ENV = $site: line $2, '$(sed -n "$2p" "$site")', failed with code $1"
    case $what in
      *module* | *'ml '* | *conda*)
        trap - EXIT
        die "$BAD_CONFIGURATION" "$what; without its software nothing starts" ;;
    esac
    say "$what; the job goes on" >&2
  }
  trap 'die "$BAD_CONFIGURATION" "SITE_ENV = $site: its exit ends the job, too; use return"' EXIT
  trap 'site_failed $? "$LINENO"' ERR
  here=$PWD
  # It is written for a login shell, where an unset variable is empty and a last line such as
  # `[ -d /scratch ] && SCRATCH=/scratch` may be false.
  set +u +o pipefail
  # shellcheck source=/dev/null
  source "$site"
  set +e -uo pipefail
  trap - EXIT ERR
  cd "$here" || exit "$BAD_CONFIGURATION" # recipes, code and run folder are looked up from here
  if grep -qE '^(module|ml) ' "$site" && ! type module >/dev/null 2>&1; then
    die "$BAD_CONFIGURATION" "SITE_ENV = $site: there is no 'module' on $HOSTNAME; source its \
definition first, such as /etc/profile.d/modules.sh"
  fi
fi

# Python, in a container where the site has one: `container` is an array of words such as
# (apptainer exec --nv image.sif), which an environment variable cannot be.
[ -n "${container+set}" ] || container=()
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ ${#container[@]} = 0 ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
python=("${container[@]}" "$PYTHON" -u)

setting() { # NAME DEFAULT [WORD...]: the last --NAME VALUE or --NAME=VALUE among the words
  local name=--$1 value=$2
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      "$name") value=${2-} ;;
      "$name"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s\n' "$value"
}

# Sets `settings`: recipe and data, then what was given to the script, which therefore wins.
complete() { # RECIPE [SETTING...]
  local recipe root name
  recipe=$(setting recipe "$@")
  shift
  name=$(basename "$recipe" .yaml)
  settings=(--recipe "$recipe")
  root=${SHARDS:+$SHARDS/${name%%_*}} # recipe domainnet_vitl reads $SHARDS/domainnet
  if [ -d "$root" ]; then settings+=(--data.root "$root"); fi
  settings+=("$@")
}

# TEXT as one word of any sh, which runs `pipe:` commands; %q of bash may give what only bash reads.
quoted() { # TEXT
  printf "'%s'" "$(printf '%s\n' "$1" | sed "s/'/'\\\\''/g")"
}

# Shards go to the node's own disk as they are read, each checked against its sha256 and shared by
# the node's tasks, so that training need not wait for a copy of the set.
stage() {
  local root name list folder gib
  [ -n "${STAGE:-}" ] || return 0
  root=$(setting data.root '' "${settings[@]}")
  if [ ! -d "$root" ]; then
    say "nothing to stage: data.root is ${root:-not set}"
    return 0
  fi
  for name in data.exclude_list data.include_list; do
    list=$(setting "$name" '' "${settings[@]}")
    if [ -n "$list" ]; then
      say "not staged, read from $root: $name = $list may name samples by path, which only a local" \
        "set can look up"
      return 0
    fi
  done
  root=$(realpath "$root")
  folder=$(setting data.cache_dir "${SCRATCH:-/tmp}/moa-shards-$UID/${root##*/}" "${settings[@]}")
  # Bytes, not blocks: a file system that compresses has fewer of these than the copy will need.
  gib=$(($(du --summarize --apparent-size --block-size=1G --dereference "$root" | cut -f1) + 2))
  gib=$(setting data.cache_gib "$gib" "${settings[@]}")
  say "staging $root to $folder on every node, at most $gib GiB"
  settings+=(
    --data.root "pipe:cat $(quoted "$root")/{}" --data.cache_dir "$folder" --data.cache_gib "$gib"
  )
}

# The first node's address as SLURM knows it, which need not be a name that resolves.
rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
  fi
  export MASTER_ADDR=${MASTER_ADDR:-$first}
  # One port a job: several may share a node. Below the range that systems hand out themselves.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
}

check_tasks() {
  local tasks=${SLURM_NTASKS_PER_NODE:-$(((SLURM_NTASKS + SLURM_JOB_NUM_NODES - 1) / SLURM_JOB_NUM_NODES))}
  local gpus=${SLURM_GPUS_ON_NODE:-$tasks}
  [ "$tasks" -le "$gpus" ] || die "$BAD_CONFIGURATION" \
    "$tasks tasks a node but $gpus GPUs: one task drives one GPU; give --ntasks-per-node=$gpus"
}

# Prints the plan and finds the run folder; a bad configuration ends the job here, in seconds.
plan() {
  local text code memory=()
  if [ -n "${GPU_MEMORY:-}" ]; then memory=(--gpu_memory "$GPU_MEMORY"); fi
  text=$("${python[@]}" -m trainer.plan --world_size "$SLURM_NTASKS" "${memory[@]}" "${settings[@]}")
  code=$?
  if [ "$code" != 0 ] && [ "$stopped" != TERM ]; then
    die "$code" "not started: the plan ended with code $code, see the lines above; not requeued"
  fi
  run_folder=$(sed -n 's/^run folder: //p' <<<"$text")
  if [ -z "$run_folder" ] && [ -z "$stopped" ]; then
    die "$BAD_CONFIGURATION" "give --output_dir: the held-out domain, and so the run folder, is \
not known before the data are read"
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then printf '%s\n' "$text"; fi
}

# Runs a command in the background, so that the traps work meanwhile; returns its code.
attend() { # COMMAND [WORD...]
  local code
  [ -z "$stopped" ] || return "$RESUBMIT" # nothing has begun
  "$@" &
  child=$! begun=$SECONDS
  while :; do
    interrupted=
    wait "$child"
    code=$?
    # A trap makes `wait` return early, with more than 128.
    if [ -z "$interrupted" ] || [ "$code" -le 128 ]; then break; fi
  done
  child=
  return "$code"
}

# What all tasks will meet, before the first start; a failure ends the job here.
doctor() {
  local code
  if [ "${DOCTOR:-0}" = 0 ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then return 0; fi
  launch -m trainer.doctor
  code=$?
  if [ "$code" != 0 ] && [ -z "$stopped" ]; then
    die "$code" "not started: the doctor ended with code $code, see its table above; not requeued. \
DOCTOR=0 starts all the same"
  fi
}

# One task per GPU, each of which sees all GPUs of its node.
launch() { # PROGRAM...
  # Tasks beside this script end when it does, even if SLURM cannot reach them any more.
  export MOA_JOB_SCRIPT="${SLURMD_NODENAME:-}:$$"
  # All variables: SLURM passes on an --export of sbatch, which would keep from the tasks what was set
  # here and in site.env.
  attend srun --export=ALL --kill-on-bad-exit=1 --gpu-bind=none \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${python[@]}" "$@" "${settings[@]}"
}

# SLURM's warning before the time limit, or a user's: the tasks save and leave with code 75.
warned() {
  local warned_child=$child
  interrupted=yes stopped=${stopped:-USR1}
  if [ -z "$child" ]; then
    say "SIGUSR1: nothing runs yet that could save"
    return
  fi
  say "SIGUSR1: forwarded to the tasks"
  kill -USR1 "$child"
  # An srun that is about to start its tasks swallows it.
  if [ $((SECONDS - begun)) -lt 30 ]; then
    (sleep 10 && kill -USR1 "$warned_child") >/dev/null 2>&1 &
  fi
}

# SLURM ends the job (scancel, requeue, preemption, time limit) and tells the tasks itself.
terminated() {
  interrupted=yes stopped=TERM
  say "SIGTERM: SLURM ends this job${child:+; the tasks save first}"
}

is_finished() { [ -e "$run_folder/done" ]; }

newest() { cat "$run_folder/checkpoints/latest" 2>/dev/null || echo nothing; }

# Ends the job after the tasks left with CODE; requeues it if going on makes sense.
conclude() { # CODE
  local code=$1 said why='' lost state
  said="$code, $(meaning "$code")"
  if [ "$code" = "$FINISHED" ]; then
    if is_finished; then say "finished: $run_folder" && exit 0; fi
    code=$RESUBMIT why="srun reports success, but the run is not finished: SLURM lost its tasks"
  elif [ "$code" = "$RESUBMIT" ]; then
    why=saved
  elif [ "$stopped" = USR1 ] && { [ "$code" = 138 ] || [ "$code" = 143 ]; }; then
    code=$RESUBMIT why="stopped before the tasks could listen"
  elif [ "$code" = 73 ] && [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
    why="exit code $said; perhaps by what is left of the start before"
  fi
  if [ "$why" != saved ]; then
    lost=$(lost_nodes)
    [ -z "$lost" ] || why="a node was lost ($lost)"
  fi
  # Someone who cancels a job wants it to end, and one that SLURM requeues needs no second time.
  state=$(patiently job_state)
  if [ "$stopped" = TERM ] || [ "${state:-RUNNING}" != RUNNING ]; then
    die "$code" "${why:-ended before all was saved (exit code $said)}; SLURM decides whether this job \
(state ${state:-unknown}) runs again"
  fi
  [ -n "$why" ] || die "$code" "not requeued: exit code $said; once that is mended, 'scontrol requeue $job' or \
the same sbatch command continues"
  guard
  if job_record | grep -q ' Requeue=0 '; then
    say "this job may not be requeued (--no-requeue, or the site's JobRequeue=0)" >&2
  elif patiently scontrol requeue "$job"; then
    say "requeued: $why"
    exit "$code"
  fi
  [ "$stopped" = TERM ] || die "$code" "$why, but SLURM does not requeue this job, see the lines \
above; 'scontrol requeue $job' or the same sbatch command continues"
  die "$code" "$why; SLURM decides whether this job runs again"
}

# Nodes of this job, but that of this script, that are down. One that does not answer may be busy, or is
# down minutes later.
lost_nodes() {
  local states
  for _ in {1..30}; do
    states=$(sinfo --noheader --Node --nodes="${SLURM_JOB_NODELIST:-}" --format='%N %t' 2>/dev/null |
      grep -v "^${SLURMD_NODENAME:-none} ")
    [[ $states == *\* && $states != *down* && $stopped != TERM ]] || break
    sleep 10
  done
  awk '$2 ~ /down|fail|\*/ {print $1}' <<<"$states" | sort -u | paste -sd ' '
}

# What a busy slurmctld refuses it grants a little later; a job that SLURM ends has no time to wait.
patiently() { # COMMAND [WORD...]
  local pause
  for pause in 2 5 10 20 0; do
    if "$@"; then return 0; fi
    if [ "$stopped" != TERM ]; then sleep "$pause"; fi
    if [ "$stopped" = TERM ]; then break; fi
  done
  return 1
}

# What SLURM says of this job. One element of an array has the number of the array, for which it shows
# all of them.
job_record() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "; }

job_state() { job_record | grep -o ' JobState=[A-Z]*' | cut -d= -f2; }

# Sets `job`, by which scontrol means this job alone: the number of an array would mean all elements.
identify() {
  job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    # sbatch hands these variables on to a job that an element of an array submits.
    case $(patiently job_record) in
      *' ArrayJobId='* | '') job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID ;;
    esac
  fi
}

meaning() { # CODE
  case $1 in
    2) echo "bad configuration" ;;
    65) echo "damaged data or checkpoint" ;;
    69) echo "a process of the run died or hangs" ;;
    70) echo "training became invalid" ;;
    73) echo "the run folder cannot be written or is in use" ;;
    137)
      if [ "$stopped" = TERM ]; then
        echo "a task was killed before it could save (is KillWait too short?)"
      else
        echo "a task was killed by SIGKILL (out of memory?)"
      fi
      ;;
    *) echo "see the lines above" ;;
  esac
}

# Gives up after some requeues in a row at the same step: a time limit that is too short for one
# checkpoint would otherwise burn the allocation for ever. Counts by step, not by the clock.
guard() {
  local most=${REQUEUES_WITHOUT_PROGRESS:-3} step job before count
  local notes=${requeues:-$run_folder/requeues}
  step=$(newest)
  mkdir -p "$run_folder"
  read -r job before count < <(cat "$notes" 2>/dev/null)
  if [ "$job" = "$SLURM_JOB_ID" ] && [ "$before" = "$step" ]; then
    count=$((count + 1))
  else
    count=0
  fi
  printf '%s %s %s\n' "$SLURM_JOB_ID" "$step" "$count" >"$notes" ||
    die 73 "not requeued: $notes, which counts the requeues, cannot be written"
  [ "$count" -lt "$most" ] || die "$RESUBMIT" "not requeued: $count requeues in a row without \
progress (newest checkpoint: $step); give the job more time than one start, evaluation and save need"
}

train() { # needs `settings`, see complete
  [ -n "${SLURM_JOB_ID:-}" ] || die "$BAD_CONFIGURATION" "start this script with sbatch"
  identify
  check_tasks
  rendezvous
  say "job $job, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS tasks on" \
    "$SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"
  plan
  stage
  doctor
  launch trainer/run.py
  conclude $?
}

child='' stopped='' interrupted=''
trap warned USR1
trap terminated TERM
