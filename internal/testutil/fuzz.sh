#!/usr/bin/env bash
# Run every fuzz target of the module, one after the other, for the given time each (default 20s).
set -euo pipefail
cd "$(dirname "$0")/../.."
time=${1:-20s}
count=0
while IFS=: read -r file line; do
  target=$(sed -E 's/^func (Fuzz[A-Za-z0-9_]*).*/\1/' <<<"$line")
  pkg=./$(dirname "$file")
  echo "== $pkg $target ($time)"
  go test "$pkg" -run '^$' -fuzz "^$target\$" -fuzztime "$time"
  count=$((count + 1))
done < <(grep -rE --include='*_test.go' '^func Fuzz' . | sed 's|^\./||')
[ "$count" -gt 0 ] || { echo "no fuzz targets found" >&2; exit 1; }
echo "$count fuzz targets passed"
