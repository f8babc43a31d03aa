#!/usr/bin/env bash
# image.sh BIN: writes BIN/trivet-image.tar, the container image of BIN/trivet as an OCI archive, without Docker.
# `make image` builds the program first and calls this. From the environment, all optional:
#
#	IMAGE              the name in the archive (trivet:latest, which means docker.io/library/trivet:latest)
#	VERSION            for the label org.opencontainers.image.version (unknown)
#	SOURCE_DATE_EPOCH  the time of the image in Unix seconds (that of the last commit; without git, 0)
#
# Two layers: the Debian packages (rootfs.sh), which stay the same from version to version, and the program.
set -euo pipefail
umask 022

fail() {
  echo "image: $*" >&2
  exit 1
}

[ $# -eq 1 ] || fail "usage: image.sh BIN"
deploy=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(cd "$1" && pwd)
cache=$bin/image
[ -x "$bin/trivet" ] || fail "$bin/trivet is not there: run make build"

mkdir -p "$cache"
exec 9>"$cache/lock" # two at once would pull the folders from under each other
flock -w 600 9 || fail "another make image has held $cache/lock for 10 minutes"

(cd "$deploy/../tools" && GOFLAGS='' "${GO:-go}" build -o "$bin/tools/image" ./image)
rootfs=$("$deploy/rootfs.sh" "$cache")
install -D -m 0755 "$bin/trivet" "$cache/program/usr/local/bin/trivet"

commit=$(git -C "$deploy" rev-parse HEAD 2>/dev/null || echo unknown)
"$bin/tools/image" -o "$bin/trivet-image.tar" -ref "${IMAGE:-trivet:latest}" -arch "$(dpkg --print-architecture)" \
  -created "${SOURCE_DATE_EPOCH:-$(git -C "$deploy" log -1 --format=%ct 2>/dev/null || echo 0)}" \
  -layer "$rootfs" -layer "$cache/program" \
  -user 0:0 -env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin -entrypoint /usr/local/bin/trivet \
  -label org.opencontainers.image.title=trivet \
  -label org.opencontainers.image.description="Replicated block volumes for Kubernetes" \
  -label org.opencontainers.image.source=https://github.com/trivet-csi/trivet \
  -label org.opencontainers.image.licenses=Apache-2.0 \
  -label org.opencontainers.image.revision="$commit" \
  -label org.opencontainers.image.version="${VERSION:-unknown}"
