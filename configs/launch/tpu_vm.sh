#!/usr/bin/env bash
# Train on Cloud TPU VMs that are requested as a queued resource, and request them again after each preemption.
#
# Runs where gcloud is logged in and stays on (a small VM, or a terminal in tmux). Give these in the environment:
#   PROJECT, ZONE  of the TPU;  NAME  of the queued resource, of the node, and of the run
#   SHARE          an NFS share that the TPU VMs can reach, HOST:/PATH, such as a Filestore instance
#   SOURCE         what pip installs: a wheel on the share (/mnt/share/slm_jax-….whl), or git+https://…
# and if they differ: ACCELERATOR (v5litepod-16: 4 hosts of 4 chips), RUNTIME, TRAIN (options of the training).
#
# The run is in /mnt/share/runs/NAME, so that every start resumes it with the same bits. Not yet run on a TPU.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}" "${SHARE:?}" "${SOURCE:?}"
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
TRAIN=${TRAIN:---config tpu_v5e_8 --mesh.fsdp 16}
POLL=${POLL:-60} # seconds between looks at the state of the request
where=(--project="$PROJECT" --zone="$ZONE")

# Prints the state of the request: NOT_FOUND if there is none, UNKNOWN if gcloud fails in another way.
state() {
  local errors
  errors=$(mktemp)
  if gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2> "$errors"; then
    :
  elif grep -q NOT_FOUND "$errors"; then
    echo NOT_FOUND
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

request() {
  gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
}

release() {
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

# Each host runs this. A process that has lost another one ends with 75 or 134, on all hosts: they start again together,
# unless one of them has ended otherwise. The last exit status of each host is left on the share for `verdict`.
training() { # ATTEMPT
  cat << EOS
set -u
sudo mkdir -p /mnt/share
mountpoint -q /mnt/share || sudo mount -o hard $SHARE /mnt/share || exit 1
python3 -m venv ~/venv && . ~/venv/bin/activate && pip install -q 'slm_jax[data] @ $SOURCE' 'jax[tpu]' || exit 1
mkdir -p /mnt/share/runs /mnt/share/status
while :; do
  python -m slm_jax.train --run /mnt/share/runs/$NAME --data.cache /mnt/share/cache $TRAIN
  status=\$?
  case \$status in 75 | 134) sleep 10 ;; *) break ;; esac
  if ls /mnt/share/status/$1.* > /dev/null 2>&1; then break; fi
done
echo \$status > /mnt/share/status/$1.\$(hostname)
EOS
}

# 0: done. 3: a host has ended in a way that would come again. 4: start again.
verdict() { # ATTEMPT
  cat << EOS
cat /mnt/share/status/$1.* 2> /dev/null | awk '
  \$1 == 0 { done = 1 } \$1 == 1 || \$1 == 2 { failed = 1 }
  END { exit failed ? 3 : done ? 0 : 4 }'
status=\$?; rm -f /mnt/share/status/$1.*; exit \$status
EOS
}

on_hosts() { # HOSTS COMMAND
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="bash -c $(printf %q "$2")"
}

while :; do
  case $(state) in
    NOT_FOUND) request || sleep "$POLL" ;; # gcloud says why it has failed
    ACTIVE)
      attempt=$NAME.$(date +%s)
      on_hosts all "$(training "$attempt")" || echo "a host has ended with an error, or was lost" >&2
      result=0
      on_hosts 0 "$(verdict "$attempt")" || result=$?
      case $result in
        0)
          until release || [ "$(state)" = NOT_FOUND ]; do sleep "$POLL"; done
          echo "done: /mnt/share/runs/$NAME"
          exit 0
          ;;
        3)
          echo "training has failed, see above; the TPU is kept: release it with gcloud when you are done" >&2
          exit 2
          ;;
      esac
      sleep "$POLL"
      ;;
    SUSPENDED | FAILED) release || sleep "$POLL" ;; # preempted, or the request could not be met: ask again
    *) sleep "$POLL" ;;                             # waiting for capacity, changing its state, or not known
  esac
done
