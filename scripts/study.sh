#!/usr/bin/env bash
# The paper's claims in miniature: models and data in outputs/study, the results in results/ (README.md there). A call
# that was cut goes on; runs that have a line in results/runs.jsonl are not made again.
#
#   bash scripts/study.sh                 STUDY=small: an hour or more on 2 cores
#   STUDY=large bash scripts/study.sh     larger models, for a GPU; in results/large
#   STUDY=tiny bash scripts/study.sh      a try in two minutes; in results/tiny
#
# RESULTS names another folder for the results.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
bash scripts/install_sandbox.sh # for the code task
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
STUDY=${STUDY:-small}
RESULTS=${RESULTS:-$([ "$STUDY" = small ] && echo results || echo "results/$STUDY")}
python scripts/study/run.py --scale "$STUDY" --results "$RESULTS" "$@"
python scripts/report.py "$RESULTS"
