#!/usr/bin/env bash
# How the adapters under examples/adapters were trained; about five minutes each on one core.
#   bash examples/train_all.sh [PYTHON]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
python=${1:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() { "$python" "$here/train_adapter.py" --data "$here/data/$1.jsonl" --out "$here/adapters/$1" "${@:2}"; }

train pirate --rank 8 --alpha 16 --targets q_proj,k_proj,v_proj,o_proj --epochs 5
train json --rank 16 --alpha 16 --rslora --targets q_proj,v_proj --epochs 4 --dtype fp16
train sentiment --rank 3 --alpha 6 --targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --epochs 4
