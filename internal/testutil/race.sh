#!/usr/bin/env bash
# race.sh PACKAGE...: go test -race -short of the packages.
#
# Once in some hundred runs the race detector's own runtime crashes in tests that use testing/synctest: "CHECK failed",
# or SIGSEGV in its depot of stacks, below a timer of a bubble that starts a goroutine
# (https://github.com/golang/go/issues/78156). A package that ended that way has given no verdict: it is tested again, at
# most twice. A test that failed, a race that was found, or a signal anywhere else is final.
set -uo pipefail
GO=${GO:-go}

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
log=$dir/log

# crashed prints the packages of the log that crashed, each with the address of the instruction if a signal ended it,
# or fails if one failed in any other way.
crashed() {
  awk '
    /^(ok  |FAIL|\?   )\t/ {
      if ($1 == "FAIL") {
        if (crashed && !failed) print $2, pc; else other = 1
      }
      crashed = failed = 0
      pc = ""
      next
    }
    /ThreadSanitizer: CHECK failed/ { crashed = 1 }
    /^PC=0x/ { crashed = 1; pc = substr($1, 6) }
    /^ *--- FAIL:/ || /WARNING: DATA RACE/ || /^panic:/ || /^fatal error:/ { failed = 1 }
    END { exit other }
  ' "$log"
}

# of_detector PACKAGE ADDRESS: whether the instruction of the test's program is the race detector's. The same sources
# make the same program.
of_detector() {
  "$GO" test -race -c -o "$dir/program" "$1" >"$dir/build" && "$GO" tool nm -n "$dir/program" | awk -v pc="$2" '
      function wide(hex) { return sprintf("%16s", hex) }
      wide($1) <= wide(pc) { name = $3; next }
      { beyond = 1 }
      END { exit !(beyond && name ~ /__(tsan|sanitizer)/) }'
}

# without_verdict prints the packages that the detector crashed, or fails if one failed in any other way.
without_verdict() {
  local list package pc
  list=$(crashed) || return
  while read -r package pc; do
    [ -z "$pc" ] || of_detector "$package" "$pc" || return
    echo "$package"
  done <<<"$list"
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
