#!/usr/bin/env bash
# Corpora as their publishers ship them (Common Crawl, LAION, LibriSpeech, a podcast, PDFs, C4) into shards, and a training
# run over a blend of them: the sample data in their formats, on a laptop.
#   [MIXTURE_STEPS=30] examples/mixture.sh [RUN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
run_dir=${1:-runs/mixture}
steps=${MIXTURE_STEPS:-30}
corpora=$run_dir/corpora shards=$run_dir/shards
rm -rf "$run_dir"
[ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH

# 1. The corpora. In their place stand folders of real ones: docs/corpora.md says where each is had.
python examples/make_corpora.py "$corpora"

# 2. What a sample of each would become, before hours are spent.
python tools/preprocess_data.py --check --input "$corpora"

# 3. Shards, one set a corpus, so that the blend is a setting. On a cluster each is an array: examples/preprocess_array.sh.
for corpus in common_crawl laion librispeech podcast papers c4; do
  python tools/preprocess_data.py --input "$corpora/$corpus" --output-prefix "$shards/$corpus" \
    --tokenizer examples/sample_data/tokenizer.json --workers 2
done

# 4. A model over all of them.
python -m megatron_mm.train tiny run_dir="$run_dir/run" training.steps="$steps" schedule.warmup_steps="$((steps / 9))" \
  data.train="{$shards/common_crawl: 0.25, $shards/c4: 0.25, $shards/laion: 0.2, $shards/librispeech: 0.1, $shards/podcast: 0.1, $shards/papers: 0.1}"
python tools/report_run.py "$run_dir/run"
