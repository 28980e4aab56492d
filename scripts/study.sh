#!/usr/bin/env bash
# The paper's claims, on small models and on a real one: models and data in outputs/study, the results in results/
# (README.md there). A call that was cut goes on; runs that have a line in runs.jsonl are not made again.
#
#   bash scripts/study.sh                 STUDY=small: small models, an hour or more on 2 cores
#   STUDY=large bash scripts/study.sh     larger ones, for a GPU; in results/large
#   STUDY=tiny bash scripts/study.sh      a try in two minutes; in results/tiny
#   STUDY=smollm2 GMT_DATA_DIR=FOLDER bash scripts/study.sh     SmolLM2-135M, some 14 hours on 2 cores with bf16,
#                                                               twice that without; in results/smollm2
#
# RESULTS names another folder for the results.
set -euo pipefail
for name in RESULTS GMT_DATA_DIR; do # setup.sh changes the folder
    [ -z "${!name:-}" ] || { path=$(realpath -m "${!name}"); export "$name=$path"; }
done
source "$(dirname "$0")/setup.sh"
export OMP_WAIT_POLICY=passive
STUDY=${STUDY:-small}
RESULTS=${RESULTS:-$([ "$STUDY" = small ] && echo results || echo "results/$STUDY")}
case $STUDY in
smollm2*) ;;
*) bash scripts/install_sandbox.sh ;; # for the code task
esac
python scripts/study/run.py --study "$STUDY" --results "$RESULTS" "$@"
python scripts/report.py "$RESULTS"
if [ "$(realpath -m "$RESULTS")" = "$(realpath -m results/smollm2)" ]; then python scripts/report.py results; fi # its table of claims has both
