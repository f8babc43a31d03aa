/*
 * members.pml: voters come and go while entries are queued. The kind of an entry is the new set of
 * voters, 0 for a plain write. Single-server changes as hashicorp/raft makes them: the newest
 * configuration in the log counts at once, the next one waits until it is committed and until the
 * leader has committed an entry of its own term (raft.go: configurationChangeChIfStable); a leader
 * never removes itself (ours transfers leadership first). Everyone outside the voters is a learner.
 */
#define MEMBERS
#include "core.pml"

#define canChange(s, m)	(canAppend(s) && IN(s, m) && POP(CFG(s) ^ (m)) == 1 && CFGIDX(s) <= commit[s] && OWNTERM(s))
#define OWNTERM(s)	(commit[s] > 0 && TERM(MEM(s, commit[s])) == term[s])
#define CHANGE(s, m)	:: d_step { canChange(s, m) -> append(s, m) }
#define PROPOSALS(s)	:: d_step { canAppend(s) -> append(s, 0) } \
	CHANGE(s, 1) CHANGE(s, 2) CHANGE(s, 3) CHANGE(s, 4) CHANGE(s, 5) CHANGE(s, 6) CHANGE(s, 7)
#include "server.pml"
