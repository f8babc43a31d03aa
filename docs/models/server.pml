/* server.pml: the steps a server may take, the start, and promise 1. Included last. */

#define STORE(s, t, e)	:: d_step { canStore(s, t, e) -> store(s, t, e) }
#define LEARN(s, t, c)	:: d_step { canLearn(s, t, c) -> learn(s, c) }
#if M == 1
#define PER_INDEX(op, s, t)	op(s, t, 1)
#elif M == 2
#define PER_INDEX(op, s, t)	op(s, t, 1) op(s, t, 2)
#else
#define PER_INDEX(op, s, t)	op(s, t, 1) op(s, t, 2) op(s, t, 3)
#endif
#if T == 2
#define PER_TERM(op, s)	PER_INDEX(op, s, 1) PER_INDEX(op, s, 2)
#else
#define PER_TERM(op, s)	PER_INDEX(op, s, 1) PER_INDEX(op, s, 2) PER_INDEX(op, s, 3)
#endif

proctype server(byte s) {
end:	do
	:: d_step { canAsk(s) -> ask(s) }
	:: d_step { canGrant(s, 0) -> grant(s, 0) }
	:: d_step { canGrant(s, 1) -> grant(s, 1) }
#if N > 2
	:: d_step { canGrant(s, 2) -> grant(s, 2) }
#endif
#if N > 3
	:: d_step { canGrant(s, 3) -> grant(s, 3) }
	:: d_step { canGrant(s, 4) -> grant(s, 4) }
#endif
	:: d_step { canHear(s, 2) -> hear(s, 2) }
#if T > 2
	:: d_step { canHear(s, 3) -> hear(s, 3) }
#endif
	:: d_step { qn[s] > 0 -> flush(s); printf("server %d flushes a record\n", s); settle() }
	PER_TERM(STORE, s)
	PER_TERM(LEARN, s)
	:: d_step { canCrash(s) -> crash(s) }
#if RESTARTS > 0
	:: d_step { canRestart(s) -> restart(s) }
#endif
	PROPOSALS(s)
#ifdef CATCHUP
	HANDOVER(s)
#endif
	od
}

/* All servers start equal (voters, at least), so whoever asks for votes first may be called 0: one
 * of N symmetric parts of the state space is searched, and the others are its renamings. */
init {
	d_step { ask(0) };
	atomic {
		run server(0); run server(1);
#if N > 2
		run server(2);
#endif
#if N > 3
		run server(3); run server(4);
#endif
		skip
	}
}

/* Promise 1 as a never claim: what was answered is on the disks of a quorum, always. */
#ifdef QUORUMDISK
#define ON(s, i)	(IN(s, INITCFG) && DISK(s, i) == CHOSEN(i))
#if N == 5
#define KEPT(i)		(CHOSEN(i) == 0 || \
			ON(0, i) + ON(1, i) + ON(2, i) + ON(3, i) + ON(4, i) >= QUORUM(INITCFG))
#elif N == 3
#define KEPT(i)		(CHOSEN(i) == 0 || ON(0, i) + ON(1, i) + ON(2, i) >= QUORUM(INITCFG))
#else
#define KEPT(i)		(CHOSEN(i) == 0 || ON(0, i) + ON(1, i) >= QUORUM(INITCFG))
#endif
#if M == 1
#define ALLKEPT		KEPT(1)
#elif M == 2
#define ALLKEPT		(KEPT(1) && KEPT(2))
#else
#define ALLKEPT		(KEPT(1) && KEPT(2) && KEPT(3))
#endif
never {
	do
	:: !ALLKEPT -> break
	:: else
	od
}
#endif
