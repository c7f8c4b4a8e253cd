#!/usr/bin/env bash
# From an empty machine with 8 GPUs to a scored, shared GPT-2. Run it in the checkout; run it again after whatever
# stopped it: each stage goes on where it was.
#
#   recipes/reproduce.sh                              GPT-2 124M on 10 billion tokens of FineWeb-Edu
#   HUB_ID=USER/NAME recipes/reproduce.sh             and then shared on the Hub (after: .venv/bin/hf auth login)
#   RECIPE=gpt2_350m PREPARE="fineweb-edu --subset sample-100BT" recipes/reproduce.sh
#
# More by environment variables: SHARDS (where they go; default: the recipe's data.path), HARDWARE (a file of
# accelerate_configs without .yaml; default ddp_8gpu), OPTIONS (of train.py), TASKS_OPTIONS (of python -m eval), TRIES.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=${RECIPE:-gpt2_124m}
hardware=${HARDWARE:-ddp_8gpu}
tries=${TRIES:-100}
prepare=${PREPARE:-fineweb-edu}
[ -f "recipes/$recipe.yaml" ] || { echo "error: no recipes/$recipe.yaml; there are: $(ls recipes/*.yaml)" >&2; exit 1; }
shards=${SHARDS:-$(sed -n 's/^  path: *\([^ ]*\).*/\1/p' "recipes/$recipe.yaml")}
run=runs/$recipe
started=runs/.$recipe.started
newest='' times=0

echo "== 1. install"
[ -x .venv/bin/accelerate ] || { python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e .; }

echo "== 2. data: $shards"
if [ ! -f "$shards/manifest.json" ]; then
    # shellcheck disable=SC2086  # several words are meant
    .venv/bin/python -m data.prepare $prepare --out "$shards"
fi

echo "== 3. train: $run"
# The launcher does not pass on exit codes; status.json says how the run stands.
for try in $(seq "$tries"); do
    grep -qs '"finished"' "$run/status.json" && break
    mkdir -p runs && touch "$started"
    # shellcheck disable=SC2086
    .venv/bin/accelerate launch -q --config_file "accelerate_configs/$hardware.yaml" train.py \
        --config "recipes/$recipe.yaml" --data.path "$shards" --output_dir "$run" --resume auto ${OPTIONS:-} && break
    if [ ! "$run/status.json" -nt "$started" ] || grep -qs '"failed"' "$run/status.json"; then
        exit 1 # not a crash: the message above says what to mend
    fi
    grep -qs '"resume me"' "$run/status.json" && exit 75 # asked to stop: so does this script
    before=$newest && newest=$(ls "$run/checkpoints" 2>/dev/null | grep "^step_" | tail -n 1 || true)
    [ "$before" = "$newest" ] && times=$((times + 1)) || times=1
    [ "$times" -lt 5 ] || { echo "error: crashed 5 times in a row after the same checkpoint" >&2; exit 1; }
    echo "stopped; going on from the newest whole checkpoint (try $try of $tries)"
    sleep 10
done
grep -qs '"resume me"' "$run/status.json" && exit 75
grep -qs '"finished"' "$run/status.json" || { echo "error: $run is not finished" >&2; exit 1; }
checkpoint=$(sed -n 's/.*"checkpoint": "\(.*\)".*/\1/p' "$run/status.json")

echo "== 4. score: $checkpoint"
# shellcheck disable=SC2086
[ -f "$run/hellaswag.json" ] ||
    .venv/bin/python -m eval --model "$checkpoint" --tasks hellaswag --output "$run/hellaswag.json" ${TASKS_OPTIONS:-}
cat "$run/hellaswag.json"

echo "== 5. share"
if [ -n "${HUB_ID:-}" ]; then
    .venv/bin/python -m hub push "$checkpoint" "$HUB_ID" --results "$run/hellaswag.json"
else
    echo "set HUB_ID=USER/NAME to share $checkpoint"
fi
