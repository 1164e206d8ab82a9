#!/usr/bin/env bash
# A whole `full` run on a node that has torch and no network, in pieces; run it again to go on. Settings by environment:
#   PROFILE TABLES SEEDS METHODS SPECIMENS DEVICE JOBS   what to run (METHODS, SPECIMENS: empty for all)
#   PIECE   seconds after which a piece is stopped; the next goes on where it was (540)
#   LIMIT   seconds after which no piece is started or left running (3600); packing takes some seconds more
#   WORK    packages, cache and records, kept between calls (/tmp/cryobench-full)
#   RESULTS records ($WORK/results); what the repository holds of earlier runs is copied there and not run again
#   OUT     where the archives go ($WORK/out): full-records.tgz.aa, full-weights.tgz.aa ... of at most 15 MB each
#   WHEELHOUSE  from `make wheelhouse` (wheelhouse)     PYTHON  the one that has torch (python3)
#   CRYOBENCH_COMMIT  $(git rev-parse HEAD) of the code, with -dirty behind it if it was changed, where there is no git here
# Exit code: 0 all done, 1 something failed, 3 not everything is done yet.
# At home:  cat full-records.tgz.* | tar xz -C results; python tools/ship_records.py results --profile full
set -euo pipefail
cd "$(dirname "$0")/.."
PROFILE=${PROFILE:-full} TABLES=${TABLES:-zhang2024 tang2022} SEEDS=${SEEDS:-0,1,2} METHODS=${METHODS:-} SPECIMENS=${SPECIMENS:-}
DEVICE=${DEVICE:-cuda} JOBS=${JOBS:-1} PIECE=${PIECE:-540} LIMIT=${LIMIT:-3600}
WORK=${WORK:-/tmp/cryobench-full}
RESULTS=${RESULTS:-$WORK/results} OUT=${OUT:-$WORK/out}
WHEELHOUSE=${WHEELHOUSE:-wheelhouse} PYTHON=${PYTHON:-python3}

site=$WORK/site
if [ ! -e "$site/.ready" ]; then
  rm -rf "$site"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELHOUSE"/*.whl
  touch "$site/.ready"
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} CRYOBENCH_CACHE=$WORK/cache
"$PYTHON" -m cryobench doctor || { echo "full_run: something is missing on this machine, see above" >&2; exit 1; }

for table in $TABLES; do
  mkdir -p "$RESULTS/$table/$PROFILE"
  for file in results/{,shipped/}"$table/$PROFILE"/*; do
    [ ! -f "$file" ] || [ -e "$RESULTS/$table/$PROFILE/${file##*/}" ] || cp "$file" "$RESULTS/$table/$PROFILE/"
  done
done

left() { echo $((LIMIT - SECONDS)); }
state=0
for seed in ${SEEDS//,/ }; do # all of one seed before the next
  cells=($TABLES --profile "$PROFILE" --seeds "$seed" --results "$RESULTS")
  [ -z "$METHODS" ] || cells+=(--method $METHODS)
  [ -z "$SPECIMENS" ] || cells+=(--specimen $SPECIMENS)
  while :; do
    seconds=$(left)
    [ "$seconds" -gt 5 ] || { state=3; break 2; }
    [ "$seconds" -le "$PIECE" ] || seconds=$PIECE
    code=0
    timeout -k 20 "$seconds" "$PYTHON" -m cryobench run "${cells[@]}" --device "$DEVICE" --jobs "$JOBS" || code=$?
    case $code in
      0) break ;;
      124 | 137) echo "full_run: a piece of $seconds s is over, $(left) s left" ;;
      *) state=1; break ;; # failed cells are recorded, with their errors; the other seeds go on
    esac
  done
done

pack() { # NAME FOLDER
  rm -f "$OUT/$PROFILE-$1.tgz."*
  [ ! -d "$2" ] || tar cz -C "$2" . | split -b 15m - "$OUT/$PROFILE-$1.tgz."
}
mkdir -p "$OUT"
rm -rf "$WORK/pack"
"$PYTHON" tools/ship_records.py "$RESULTS" --profile "$PROFILE" --unchecked --to "$WORK/pack/records" --weights "$WORK/pack/weights" || state=1
pack records "$WORK/pack/records"
pack weights "$WORK/pack/weights"
"$PYTHON" -m cryobench status $TABLES --profile "$PROFILE" --seeds "$SEEDS" --results "$RESULTS" \
  ${METHODS:+--method $METHODS} ${SPECIMENS:+--specimen $SPECIMENS} > "$WORK/status.txt"
grep -v " done *$" "$WORK/status.txt" || true
echo "full_run: $(grep -c " done *$" "$WORK/status.txt" || true) of $(($(wc -l < "$WORK/status.txt") - 1)) cells are done; in $OUT:"
ls -l "$OUT" | grep " $PROFILE-" || true
exit $state
