#!/usr/bin/env bash
# Run a command as one rank of torchrun, and leave its exit status in $STATUSES/rank-$RANK.
#
#   STATUSES=DIR torchrun … --no-python scripts/launch/rank.sh python -u train.py …
#
# torchrun itself ends with 1 whatever its ranks ended with; a launcher that must distinguish "start
# the same command again" (75) from a mistake (1) reads these files.

trap : INT TERM USR1 # they reach the command as well; this shell stays to see how it ends
"$@"
status=$?
echo "$status" > "$STATUSES/.rank-$RANK" && mv "$STATUSES/.rank-$RANK" "$STATUSES/rank-$RANK"
exit "$status"
