#!/usr/bin/env bash
# The jobs of this folder, by their names in ../run_job.sh, which does the work: `bash run_job.sh JOB [ARGUMENTS ...]`.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_job.sh" "$@"
