#!/usr/bin/env bash
# Train the full network with the paper's recipe on 1,437 handwritten digits and evaluate it.
# Run it again after an interruption and it goes on where it was. Arguments are overrides for
# train.py, such as train.epochs=8.

source "$(dirname "$0")/environment.sh" requirements.txt

python scripts/prepare_dataset.py digits --out datasets/digits
python train.py --config configs/quickstart.yaml "$@"
python validate.py --run runs/quickstart --json runs/quickstart/validate.json >/dev/null
echo
python scripts/report.py runs/quickstart
