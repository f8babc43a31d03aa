#!/bin/sh
# Runs csi-sanity twice over: in this module's tests, on three servers in one process, and as the
# released program against three real processes: node calls go to the socket of one of them, controller
# calls to a `trivet csi-controller`, as on Kubernetes. Needs root. Usage:
#
#     sanity/run.sh CSI_SANITY [TRIVET]
#
# CSI_SANITY is the path of the csi-sanity program, TRIVET that of ours (default bin/trivet).
set -eu
sanity=$1
trivet=${2:-bin/trivet}
nodes="a b c"

go test -count=1 -p 1 -timeout 30m ./sanity/... # one cluster at a time: they compete for the disk

dir=$(mktemp -d /tmp/trivet-sanity.XXXXXX)
pids=

finish() {
	status=$?
	trap - EXIT INT TERM
	# shellcheck disable=SC2086 # a list of process ids
	[ -z "$pids" ] || kill $pids 2>/dev/null || true
	for pid in $pids; do
		wait "$pid" || status=1 # a server that does not end well is a failure
	done
	if grep -q " $dir" /proc/self/mountinfo; then
		echo "sanity: mounts left behind:" >&2
		grep " $dir" /proc/self/mountinfo >&2
		status=1
	fi
	if [ "$status" -eq 0 ]; then
		rm -rf "$dir"
	else
		echo "sanity: failed; the logs are in $dir" >&2
	fi
	exit "$status"
}
trap finish EXIT
trap 'exit 1' INT TERM

# await TEXT COMMAND...: until the command succeeds, for at most a minute.
await() {
	what=$1
	shift
	for _ in $(seq 300); do
		if "$@" >"$dir/await.log" 2>&1; then return; fi
		sleep 0.2
	done
	echo "sanity: $what: not within a minute" >&2
	cat "$dir/await.log" >&2
	return 1
}

# address NODE: where the server says that it listens.
address() { sed -n 's/.*msg=serving .*address=\([^ ]*\).*/\1/p' "$dir/$1.log" | grep .; }

"$trivet" cert ca --dir "$dir/ca" >"$dir/certs.log"
"$trivet" cert client sanity --ca "$dir/ca" --dir "$dir/client" >>"$dir/certs.log"
seed=
for node in $nodes; do
	"$trivet" cert node "$node" --ca "$dir/ca" --dir "$dir/certs-$node" >>"$dir/certs.log"
	"$trivet" server --node "$node" --zone "zone-$node" --data "$dir/data-$node" --certs "$dir/certs-$node" \
		--listen 127.0.0.1:0 ${seed:+--seed "$seed"} --csi "unix://$dir/$node.sock" --run-dir "$dir/run-$node" \
		>"$dir/$node.log" 2>&1 &
	pids="$pids $!"
	await "start of $node" address "$node"
	[ -n "$seed" ] || seed=$(address "$node")
done
"$trivet" cluster init --server "$seed" --certs "$dir/client"
all_up() { [ "$("$trivet" node list --server "$seed" --certs "$dir/client" | grep -c ' Up ')" -eq 3 ]; }
await "three nodes up" all_up
await "socket of a" test -S "$dir/a.sock"
"$trivet" csi-controller --csi "unix://$dir/controller.sock" --server "$seed" --certs "$dir/client" \
	>"$dir/controller.log" 2>&1 &
pids="$pids $!"
await "socket of the controller" test -S "$dir/controller.sock"

printf 'replicas: "3"\n' >"$dir/parameters.yaml"
printf 'iopsLimit: "5k"\npriority: "70"\n' >"$dir/mutable.yaml"
for access in mount block; do
	if ! "$sanity" --csi.endpoint="unix://$dir/a.sock" --csi.controllerendpoint="unix://$dir/controller.sock" \
		--csi.mountdir="$dir/target-$access" \
		--csi.stagingdir="$dir/staging-$access" --csi.testvolumeaccesstype="$access" \
		--csi.testvolumesize=67108864 --csi.testvolumeexpandsize=134217728 \
		--csi.testvolumeparameters="$dir/parameters.yaml" \
		--csi.testvolumemutableparameters="$dir/mutable.yaml" \
		--ginkgo.no-color >"$dir/$access.out" 2>&1; then
		cat "$dir/$access.out" >&2
		exit 1
	fi
	# A capability that is lost turns passes into skips; README.md says which ones are expected.
	passed=$(sed -n 's/.*-- \([0-9]*\) Passed.*/\1/p' "$dir/$access.out")
	echo "sanity: program, $access: ${passed:-0} specs passed"
	if [ "${passed:-0}" -lt 100 ]; then
		cat "$dir/$access.out" >&2
		echo "sanity: $access: ${passed:-0} specs passed, want 100" >&2
		exit 1
	fi
done
