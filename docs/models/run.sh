#!/bin/sh
# Checks the models of durability at message boundaries with SPIN: README.md says what they say.
#
#   docs/models/run.sh [-j jobs] [-o folder] [deep]
#
# Every search is exhaustive within its bounds (no bitstate, no hash compaction) and fails when it
# is cut short. Exits 0 only if all that must hold holds and all that must be refuted is refuted.
# "deep" adds the searches with larger bounds: about an hour and 16 GiB of memory.
# Results and counterexamples, step by step, stay in the folder (bin/models by default).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=$here/../../bin/models
jobs=2
limit=900 # seconds one search may take
mem=6000  # MiB one search may use
deep=
while [ $# -gt 0 ]; do
	case $1 in
	-j) jobs=$2; shift 2 ;;
	-o) out=$2; shift 2 ;;
	deep) deep=1; limit=7200; mem=16000; shift ;;
	*) sed -n '2,10p' "$0" >&2; exit 2 ;;
	esac
done
for tool in spin gcc timeout xargs; do
	command -v $tool >/dev/null || { echo "models: $tool is missing (apt-get install spin gcc)" >&2; exit 2; }
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

# one NAME EXPECT MODEL FLAGS...: one search in a folder of its own; writes NAME/result.
one() {
	name=$1 expect=$2 model=$3
	shift 3
	dir=$out/$name
	rm -rf "$dir"
	mkdir -p "$dir"
	cd "$dir"
	cp "$here"/*.pml .
	# The search for a counterexample goes breadth first, for a shortest trail, unless -DDEPTH is among the flags.
	order=
	case "$expect $*" in
	refuted*-DDEPTH*) ;;
	refuted*) order=-DBFS; set -- "$@" -DBREADTH ;;
	esac
	# -O2 takes gcc longer than it saves the search.
	spin "$@" -a "$model.pml" >spin.log 2>&1 || { echo broken >result; return 0; }
	gcc -O1 -w -DSAFETY -DNOREDUCE $order -DMEMLIM="$mem" -o pan pan.c >gcc.log 2>&1 || { echo broken >result; return 0; }
	timeout "$limit" nice ./pan -m100000 -n >pan.log 2>&1 || true
	rm -f pan pan.[bchmpt]
	states=$(sed -n 's/^ *\([0-9][0-9.e+]*\) states, stored.*/\1/p' pan.log | head -1)
	depth=$(sed -n 's/.*depth reached \([0-9]*\),.*/\1/p' pan.log | head -1)
	verdict=cut-short
	if grep -q 'assertion violated (\|end state in claim reached\|claim violated' pan.log; then
		verdict=refuted
	elif grep -q 'errors: 0' pan.log &&
		! grep -q 'max search depth too small\|out of memory\|Search not completed' pan.log; then
		verdict=holds
	fi
	if [ -f "$model.pml.trail" ]; then
		spin "$@" -t -p "$model.pml" >steps.full 2>&1 || true
		spin "$@" -t -B -T "$model.pml" 2>/dev/null | grep '^server\|^instance' >steps || true
		grep 'assertion violated\|claim' pan.log | head -1 | cut -c1-160 >>steps
	fi
	echo "$verdict ${states:-0} ${depth:-0}" >result
}

if [ "${MODELS_ONE:-}" ]; then # called by xargs below
	# shellcheck disable=SC2086 # a list of words
	one $MODELS_ONE
	exit 0
fi

# The searches: name, what is expected, model, bounds and mutations.
plan() {
	three="-DT=2 -DCRASHES=2 -DQUORUMDISK -DATCOMMIT"
	one_voter="-DN=2 -DINITCFG=1 -DT=3 -DM=3 -DCRASHES=2"
	cat <<-PLAN
	three-voters holds gates $three
	three-voters-restart holds gates -DT=2 -DCRASHES=1 -DRESTARTS=1 -DQUORUMDISK -DATCOMMIT
	three-voters-three-terms holds gates -DT=3 -DM=1 -DQ=2 -DCRASHES=1 -DQUORUMDISK -DATCOMMIT
	two-voters-learner holds gates -DINITCFG=3 -DT=2 -DCRASHES=2 -DQUORUMDISK -DATCOMMIT
	one-voter-learner holds gates $one_voter -DQUORUMDISK
	one-voter-learner-sync holds gates $one_voter -DQUORUMDISK -DATCOMMIT -DSYNC1
	members-two holds members -DINITCFG=3 -DT=2 -DM=3 -DCRASHES=1 -DSYNC1
	members-one holds members -DINITCFG=1 -DT=2 -DM=3 -DCRASHES=1 -DSYNC1
	catchup holds catchup -DT=2 -DCRASHES=1 -DQUORUMDISK
	fence holds fence -DT=2 -DCRASHES=1
	gate1 refuted gates -DT=2 -DCRASHES=1 -DNOGATE1
	gate2 refuted gates -DT=2 -DCRASHES=1 -DNOGATE2 -DATCOMMIT
	gate3 refuted gates -DN=2 -DINITCFG=1 -DT=2 -DCRASHES=1 -DNOGATE3
	gate4 refuted gates -DT=2 -DCRASHES=1 -DNOGATE4
	gate1-copies refuted gates -DT=2 -DCRASHES=1 -DNODUP
	gate1-fence refuted fence -DT=2 -DCRASHES=1 -DNOGATE1 -DFENCEONLY -DDEPTH
	gate2-and-3 refuted gates -DT=2 -DCRASHES=1 -DNOGATE2 -DNOGATE3
	gate2-and-4 refuted gates -DT=2 -DCRASHES=1 -DNOGATE2 -DNOGATE4 -DNOH4
	gate4-one-voter refuted gates -DN=2 -DINITCFG=1 -DT=2 -DCRASHES=1 -DNOGATE4 -DNOH4
	gate2-alone holds gates -DT=2 -DCRASHES=1 -DNOGATE2
	gate3-alone holds gates -DT=2 -DCRASHES=1 -DNOGATE3 -DATCOMMIT -DQUORUMDISK
	gate3-sync holds gates $one_voter -DQUORUMDISK -DATCOMMIT -DSYNC1 -DNOGATE3
	wait-for-index refuted gates -DT=3 -DM=1 -DCRASHES=1 -DINDEXWAIT -DNOH4
	config-not-synchronous refuted members -DINITCFG=3 -DT=2 -DCRASHES=1 -DSYNC1 -DASYNCCFG
	restart-takes-queue-for-durable refuted gates -DT=2 -DM=1 -DCRASHES=1 -DRESTARTS=1 -DFRESHMARK -DNOH4
	held-reply-survives-restart refuted gates -DT=2 -DCRASHES=0 -DRESTARTS=1 -DRELOG -DHELDSURVIVES
	held-reply-survives-overwrite holds gates -DT=2 -DCRASHES=1 -DHOLDINDEX
	catchup-no-flag refuted catchup -DT=2 -DCRASHES=1 -DNOFLAG
	catchup-always-replace refuted catchup -DT=2 -DCRASHES=1 -DALWAYSREPLACE -DDEPTH
	catchup-vote-lost refuted catchup -DT=2 -DCRASHES=0 -DVOTELOST
	catchup-start-before-durable refuted catchup -DT=2 -DCRASHES=1 -DNOKEEPWAIT
	catchup-x-not-applied refuted catchup -DT=2 -DCRASHES=1 -DXQUEUED -DDEPTH
	fence-not-in-state-machine refuted fence -DT=2 -DM=3 -DCRASHES=0 -DNOFSMFENCE
	PLAN
	if [ "$deep" ]; then
		cat <<-PLAN
		deep-three-terms holds gates -DT=3 -DCRASHES=1 -DQUORUMDISK -DATCOMMIT
		deep-fence-no-crash holds fence -DT=2 -DM=3 -DCRASHES=0
		deep-fence holds fence -DT=2 -DM=3 -DCRASHES=1
		deep-catchup holds catchup -DT=2 -DM=3 -DCRASHES=1 -DQUORUMDISK
		PLAN
	fi
}

plan >"$out/plan"
# shellcheck disable=SC2016 # expanded by the inner shell
tr '\n' '\0' <"$out/plan" | xargs -0 -P "$jobs" -I{} env MODELS_ONE={} sh "$here/run.sh" -o "$out"

bad=0
while read -r name expect model flags; do
	read -r verdict states depth <"$out/$name/result" || verdict=broken
	if [ "$verdict" = "$expect" ]; then mark=ok; else mark=WRONG bad=1; fi
	printf '%-34s %-9s %9s states, depth %3s  %s\n' "$name" "$verdict" "${states:-0}" "${depth:-0}" "$mark"
done <"$out/plan"
for g in 1 2 3 4; do
	read -r verdict _ <"$out/gate$g/result"
	if [ "$verdict" = refuted ]; then echo "gate $g mutated: refuted"; else echo "gate $g mutated: NOT refuted"; fi
done
echo "counterexamples: $out/*/steps (steps.full: every statement)"
exit $bad
