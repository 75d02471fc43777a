#!/bin/sh
# Measurements and training in order within a number of minutes; everything is in one folder.
#
#     sh benchmarks/gpu_session.sh FILE OUT [MINUTES] [TUNE_FILE] [options of train_packed.py]
#
# FILE and TUNE_FILE are of pack_patches.py; an empty TUNE_FILE ("") keeps the default learning rate.
# A later call with the same FILE and OUT continues. Environment variables: PYTHON, DEVICE, SIZES
# (networks in order, "native published") and SPEED (minutes for measurements of speed, 1.5).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
file=$1
out=$2
minutes=${3:-10}
tune=${4:-}
if [ $# -gt 4 ]; then shift 4; else shift $#; fi
device=${DEVICE:-cuda}
speed=${SPEED:-1.5}
end=$(($(date +%s) + $(echo "$minutes" | awk '{print int(60 * $1)}')))
mkdir -p "$out"

left() {
    echo "$end $(date +%s)" | awk '{left = ($1 - $2) / 60; print (left > 0 ? left : 0)}'
}

if [ ! -e "$out/speed.json" ]; then
    "$python" "$here/gpu.py" "$file" --out "$out/speed.json" --device "$device" --minutes "$speed"
fi
for size in ${SIZES:-native published}; do
    "$python" "$here/train_packed.py" "$file" --out "$out" --network "$size" --device "$device" \
        --minutes "$(left)" ${tune:+--tune "$tune"} "$@"
done
