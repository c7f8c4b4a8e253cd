#!/usr/bin/env bash
# From an empty machine with 8 GPUs to a scored and published GPT-2. Run it in the checkout. If it stops, run it again:
# each stage continues where it stopped.
#
#   recipes/reproduce.sh                              GPT-2 124M on 10 billion tokens of FineWeb-Edu
#   HUB_ID=USER/NAME recipes/reproduce.sh             the same, then pushed to the Hub (after: .venv/bin/hf auth login)
#   RECIPE=gpt2_350m recipes/reproduce.sh             another size, on FineWeb-Edu's sample of 100 billion tokens (200 GB);
#                                                     PREPARE="fineweb-edu --subset sample-100BT --max_tokens 35e9" is enough
#   PREPARE=fineweb-edu recipes/reproduce.sh          tokenize the text here; by default, tokens made by others are downloaded
#
# More environment variables: SHARDS (folder of the shards; default: the recipe's data.path), HARDWARE (a file of
# accelerate_configs without .yaml; default ddp_8gpu), OPTIONS (of train.py), TASKS_OPTIONS (of python -m eval), TRIES
# (the most launches of train.py; default 100).
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=${RECIPE:-gpt2_124m}
hardware=${HARDWARE:-ddp_8gpu}
tries=${TRIES:-100}
case $recipe in
    gpt2_350m | gpt2_774m | gpt2_1558m) prepare="fineweb-edu --subset sample-100BT" ;;
    *) prepare="pretokenized kjj0/finewebedu10B-gpt2" ;;
esac
prepare=${PREPARE:-$prepare}
[ -f "recipes/$recipe.yaml" ] ||
    { echo "error: recipes/$recipe.yaml not found; the recipes are $(ls recipes/*.yaml)" >&2; exit 1; }
run=runs/$recipe
started=runs/.$recipe.started
newest='' crashes=0

# Print the value of a key ("data.path") of a YAML or JSON file; nothing if the file does not have it.
value_of() {
    .venv/bin/python -c '
import functools, sys, yaml
with open(sys.argv[1], encoding="utf-8") as file:
    print(functools.reduce(lambda values, key: values[key], sys.argv[2].split("."), yaml.safe_load(file)))
' "$1" "$2" 2>/dev/null || true
}
status() { value_of "$run/status.json" status; }

echo "== 1. install"
[ -x .venv/bin/accelerate ] || { python3 -m venv .venv; .venv/bin/pip install -q -c constraints.txt -e .; }

shards=${SHARDS:-$(value_of "recipes/$recipe.yaml" data.path)}
[ -n "$shards" ] || { echo "error: recipes/$recipe.yaml does not set data.path: set SHARDS" >&2; exit 1; }
echo "== 2. data: $shards"
if [ ! -f "$shards/manifest.json" ]; then
    # shellcheck disable=SC2086  # split into words on purpose
    .venv/bin/python -m data.prepare $prepare --out "$shards"
fi

echo "== 3. train: $run"
# The launcher does not return the exit code of train.py, so the loop reads status.json.
for try in $(seq "$tries"); do
    [ "$(status)" = finished ] && break
    mkdir -p runs && touch "$started"
    # shellcheck disable=SC2086
    .venv/bin/accelerate launch -q --config_file "accelerate_configs/$hardware.yaml" train.py \
        --config "recipes/$recipe.yaml" --data.path "$shards" --output_dir "$run" --resume auto ${OPTIONS:-} && break
    if [ ! "$run/status.json" -nt "$started" ] ||
        { [ "$(status)" = failed ] && [ "$(value_of "$run/status.json" is_mistake)" != False ]; }; then
        exit 1 # not a crash: the message above says what to fix
    fi
    [ "$(status)" = "resume me" ] && exit 75 # a stop was requested
    before=$newest && newest=$(ls "$run/checkpoints" 2>/dev/null | grep "^step_" | tail -n 1 || true)
    [ "$before" = "$newest" ] && crashes=$((crashes + 1)) || crashes=1
    [ "$crashes" -lt 5 ] || { echo "error: crashed 5 times in a row after the same checkpoint" >&2; exit 1; }
    echo "crashed; resuming from the newest complete checkpoint (try $try of $tries)"
    sleep 10
done
[ "$(status)" = "resume me" ] && exit 75
[ "$(status)" = finished ] || { echo "error: the run in $run did not finish" >&2; exit 1; }
checkpoint=$(value_of "$run/status.json" checkpoint)

echo "== 4. score: $checkpoint"
# shellcheck disable=SC2086
[ -f "$run/hellaswag.json" ] ||
    .venv/bin/python -m eval --model "$checkpoint" --tasks hellaswag --output "$run/hellaswag.json" ${TASKS_OPTIONS:-}
cat "$run/hellaswag.json"

echo "== 5. publish"
if [ -n "${HUB_ID:-}" ]; then
    .venv/bin/python -m hub push "$checkpoint" "$HUB_ID" --results "$run/hellaswag.json"
else
    echo "to push $checkpoint, set HUB_ID=USER/NAME"
fi
