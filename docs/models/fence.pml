/*
 * fence.pml: the attach fence. Entries are writes of the old attachment (epoch 1), the fence that
 * raises the epoch to 2, and writes of the new attachment. The old attacher lives on and any server
 * that believes to lead takes its writes. The state machine refuses a write whose epoch is below the
 * highest fence before it in the log (H12, I6); a leader answers a write or a fence when it applied it.
 */
#define FENCE
#include "core.pml"
#define OLDWRITE	1
#define FENCED		2
#define NEWWRITE	3

byte fenceAt;	/* index of the fence once it was acknowledged, else 0 */
byte ackedOld;	/* highest index at which an old write was acknowledged as done */

/* Is there a fence below index i in the log of s? */
#define FENCEBELOW(s, i)	((i) > 1 && KIND(MEM(s, 1)) == FENCED || (i) > 2 && KIND(MEM(s, 2)) == FENCED)

#ifdef NOFSMFENCE	/* mutation: only the leader looks, when it takes the write */
#define REFUSED(s, i)	false
#define MAYTAKE(s)	!((commit[s] > 0 && KIND(MEM(s, 1)) == FENCED) || (commit[s] > 1 && KIND(MEM(s, 2)) == FENCED))
#else
#define REFUSED(s, i)	FENCEBELOW(s, i)
#define MAYTAKE(s)	true
#endif

/* What leaders answered: an entry of their own term, once applied. */
inline answers() {
	for (w : 0 .. N-1) {
		for (x : 1 .. M) {
			if
			:: role[w] == LEADER && x <= lim[w] && TERM(MEM(w, x)) == term[w] ->
				if
				:: KIND(MEM(w, x)) == FENCED ->
					fenceAt = (fenceAt == 0 -> x : fenceAt);
					assert(ackedOld < x)
				:: KIND(MEM(w, x)) == OLDWRITE && !REFUSED(w, x) ->
					ackedOld = MAX(ackedOld, x);
					/* Done after the fence was done: the new holder's data is overwritten. A write that
					 * stands before the fence in the log may still be answered late: it happened before. */
					assert(fenceAt == 0 || x < fenceAt)
				:: else
				fi
			:: else
			fi
		}
	}
	w = 0; x = 0
}

#define PROPOSALS(s) \
	:: d_step { canAppend(s) && MAYTAKE(s) -> append(s, OLDWRITE) } \
	:: d_step { canAppend(s) -> append(s, FENCED) } \
	:: d_step { canAppend(s) && fenceAt != 0 -> append(s, NEWWRITE) }
#include "server.pml"
