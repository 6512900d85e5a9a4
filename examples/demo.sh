#!/usr/bin/env bash
# The main job, end to end, on a laptop: real files in, a trained multimodal model out, through a stop and another layout.
#   [DEMO_STEPS=140] examples/demo.sh [RUN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
run_dir=${1:-runs/demo}
steps=${DEMO_STEPS:-140}
shards=$run_dir/shards
rm -rf "$run_dir"/{shards,checkpoints,health,tensorboard,export,export.partial,metrics.jsonl,loss.png,config.yaml,DONE}

# 1. Files to shards. An image or recording and the text file of the same name are one document.
for split in train heldout; do
  python tools/preprocess_data.py --input "examples/sample_data/$split" --output-prefix "$shards/$split" \
    --tokenizer examples/sample_data/tokenizer.json --workers 2
done

train() {
  torchrun --nproc-per-node 4 -m megatron_mm.train tiny run_dir="$run_dir" \
    data.train="[$shards/train]" data.validation="[$shards/heldout]" training.steps="$steps" \
    schedule.warmup_steps="$((steps / 9))" "$@"
}

# 2. Half of the steps: two tensor ranks with sequence parallelism, times two pipeline stages.
train parallel.tp=2 parallel.pp=2 training.stop_after="$((steps / 2))"

# 3. The other half from the checkpoint, in another layout: two pipeline stages, times two data ranks.
train parallel.tp=1 parallel.pp=2

# 4. What came of it.
python tools/report_run.py "$run_dir"

# 5. The model as Hugging Face folders, which stock transformers loads: a caption, and a text that goes on.
newest=$(find "$run_dir/checkpoints" -name 'step_*' -not -name '*.partial' | sort | tail -n 1)
python tools/convert_checkpoint.py to-hf "$newest" "$run_dir/export" --tokenizer examples/sample_data/tokenizer.json
python examples/use_export.py "$run_dir/export" examples/sample_data/heldout/photos/purple-daisies.jpg
