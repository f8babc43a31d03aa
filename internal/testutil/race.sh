#!/usr/bin/env bash
# race.sh PACKAGE...: go test -race -short of the packages.
#
# Once in some hundred runs the race detector's own runtime crashes in tests that use testing/synctest, with
# "ThreadSanitizer: CHECK failed" (https://github.com/golang/go/issues/78156). A package that ended that way has
# given no verdict: it is tested again, at most twice. A test that failed, or a race that was found, is final.
set -uo pipefail
GO=${GO:-go}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# without_verdict prints the packages of the log that crashed, or fails if one failed in any other way.
without_verdict() {
  awk '
    /^(ok  |FAIL|\?   )\t/ {
      if ($1 == "FAIL") {
        if (crashed && !failed) print $2; else other = 1
      }
      crashed = failed = 0
      next
    }
    /ThreadSanitizer: CHECK failed/ { crashed = 1 }
    /^ *--- FAIL:/ || /WARNING: DATA RACE/ || /^panic:/ || /^fatal error:/ { failed = 1 }
    END { exit other }
  ' "$log"
}

packages=("$@")
for try in 1 2 3; do
  "$GO" test -race -short -timeout 25m "${packages[@]}" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  [ "$status" -ne 0 ] || exit 0
  again=$(without_verdict) || exit "$status"
  [ -n "$again" ] && [ "$try" -lt 3 ] || exit "$status"
  mapfile -t packages <<<"$again"
  echo "race.sh: the race detector crashed, no verdict: testing again: ${packages[*]}"
done
