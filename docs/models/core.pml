/*
 * core.pml: a Raft group whose log acknowledges a write before it is on disk.
 *
 * Included by gates.pml, members.pml, catchup.pml and fence.pml, which add steps and properties;
 * server.pml puts the steps together. Bounds come from outside (run.sh). README.md explains it all.
 *
 * Every step of a server is one d_step: in the program it is one critical section
 * (Raft's main loop, or the log under its lock). What the program does over a longer
 * time is cut into several steps: queueing and flushing, sending and receiving,
 * asking and granting. Steps of all servers interleave freely.
 */
#include "state.pml"

/* durable(s, out): the mark. The highest index below which no record is pending: a truncation or
 * an overwrite in the queue rewinds it, so "durable up to i" speaks of what stands at i now. */
inline durable(s, out) {
#ifdef INDEXWAIT
	out = MIN(mark[s], LEN(s));
#else
	out = LEN(s);
	if
	:: qn[s] == 0
	:: else ->
		for (j : 0 .. Q-1) {
			if
			:: j < qn[s] && RECIDX(QREC(s, j)) <= out -> out = RECIDX(QREC(s, j)) - 1
			:: else
			fi
		}
	fi;
#endif
#ifdef FRESHMARK
	out = MAX(out, MIN(fresh[s], LEN(s)));
#endif
	j = 0
}

/* push(s, i, x): one record enters the queue; callers have checked that there is room. */
inline push(s, idx, ent) {
	QREC(s, qn[s]) = REC(idx, ent);
	qn[s]++
}

/* flush(s): the oldest record reaches the disk. A crash keeps any prefix of the queue, because any
 * number of flushes may come right before it. */
inline flush(s) {
	k = QREC(s, 0);
	for (j : 1 .. Q-1) { QREC(s, j-1) = QREC(s, j) }
	QREC(s, Q-1) = 0;
	qn[s]--;
	for (j : 1 .. M) {
		if
		:: j == RECIDX(k) -> DISK(s, j) = RECENT(k)
		:: j > RECIDX(k) -> DISK(s, j) = 0
		:: else
		fi
	}
#ifdef INDEXWAIT
	if
	:: RECENT(k) != 0 -> mark[s] = MAX(mark[s], RECIDX(k))
	:: else
	fi;
#endif
	j = 0; k = 0
}

inline flushAll(s) {
	do
	:: qn[s] > 0 -> flush(s)
	:: else -> break
	od
}

/* drop(s, from): held replies that speak of an index from on will never become true. */
inline drop(s, from) {
#ifdef FRESHMARK
	fresh[s] = MIN(fresh[s], from - 1);
#endif
#ifndef HOLDINDEX
	for (j : 1 .. T) {
		if
		:: HELD(s, j) >= from -> HELD(s, j) = from - 1
		:: else
		fi
	}
	j = 0
#else
	skip	/* mutation: a held reply waits for its index, whatever is written there */
#endif
}

inline endInstance(s) {
	for (j : 1 .. T) {
#if RESTARTS > 0
#ifdef HELDSURVIVES
		if
		:: HELD(s, j) > 0 -> ORPHAN(s, j) = HELD(s, j)
		:: else
		fi;
#endif
#endif
		HELD(s, j) = 0
	}
	j = 0;
	role[s] = FOLLOWER;
	votes[s] = 0;
	commit[s] = 0
}

inline raiseTerm(s, t) {
	if
	:: t > term[s] -> term[s] = t; voted[s] = 0
	:: else
	fi;
	role[s] = FOLLOWER;
	votes[s] = 0
}

/* release: a reply leaves as soon as gate 1 lets it; the network may delay it at will, so sending
 * early includes sending late. A reply for e stands for all below: the leader may have asked less. */
inline release(s) {
	for (x : 1 .. T) {
		n = MIN(HELD(s, x), dur[s]);
		ACKED(x, s) = MAX(ACKED(x, s), n);
		if
		:: HELD(s, x) <= dur[s] -> HELD(s, x) = 0
		:: else
		fi;
#if RESTARTS > 0
#ifdef HELDSURVIVES
		n = MIN(ORPHAN(s, x), dur[s]);
		ACKED(x, s) = MAX(ACKED(x, s), n);
		if
		:: ORPHAN(s, x) <= dur[s] -> ORPHAN(s, x) = 0
		:: else
		fi;
#endif
#endif
		n = 0
	}
	x = 0
}

/* advance(l): the leader counts itself and the replies handed to it (raft.go: dispatchLogs matches
 * the leader's own log as soon as StoreLogs returns). Only entries of its term commit by counting. */
inline advance(l) {
	for (x : 1 .. M) {
		if
		:: x > commit[l] && TERM(MEM(l, x)) == term[l] ->
			n = IN(l, CFG(l));
			for (u : 0 .. N-1) {
				if
				:: u != l && IN(u, CFG(l)) && ACKED(term[l], u) >= x && GATE2(l, x) -> n++
				:: else
				fi
			}
			if
			:: n >= QUORUM(CFG(l)) -> commit[l] = x
			:: else
			fi
		:: else
		fi
	}
	n = commit[l];
#ifndef NOGATE3
	n = MIN(n, dur[l]);
#endif
	SENT(term[l]) = MAX(SENT(term[l]), n);
	n = 0; x = 0; u = 0
}

/* apply(s): lim[s] is how far the state machine of s has got, and with it the answers a leader
 * gave. Two state machines never differ at an index. */
inline apply(s) {
	lim[s] = commit[s];
#ifndef NOGATE4
#ifndef ATCOMMIT	/* property: what is committed in memory already counts as promised */
	lim[s] = MIN(commit[s], dur[s]);
#endif
#endif
	for (x : 1 .. M) {
		if
		:: x <= lim[s] && CHOSEN(x) == 0 -> CHOSEN(x) = MEM(s, x)
		:: x <= lim[s] && CHOSEN(x) != 0 ->
#ifndef FENCEONLY
			assert(CHOSEN(x) == MEM(s, x))	/* state machine safety; nothing answered is replaced */
#else
			skip
#endif
		:: else
		fi
	}
	x = 0
}

/* forget: clears variables that no later step can read, so that states which differ only in them
 * count once. Replies of a term are read by its live leader alone; the messages of a term are
 * read by servers that have not passed it. */
#define LEADS(k, x)	(role[k] == LEADER && term[k] == (x))
#if N == 2
#define ANY(p, x)	(p(0, x) || p(1, x))
#elif N == 3
#define ANY(p, x)	(p(0, x) || p(1, x) || p(2, x))
#else
#define ANY(p, x)	(p(0, x) || p(1, x) || p(2, x) || p(3, x) || p(4, x))
#endif
#define ATOREARLIER(k, x)	(term[k] <= (x))
inline forget() {
	for (x : 1 .. T) {
		if
		:: LDR(x) != 0 && !ANY(LEADS, x) ->
			for (k : 0 .. N-1) {
				ACKED(x, k) = 0; HELD(k, x) = 0;
#if RESTARTS > 0
#ifdef HELDSURVIVES
				ORPHAN(k, x) = 0
#endif
#endif
			}
			if
			:: !ANY(ATOREARLIER, x) ->
				SENT(x) = 0; LDR(x) = 0;
				for (k : 1 .. M) { LOG(x, k) = 0 }
			:: else
			fi
		:: else
		fi
	}
	k = 0; x = 0
}

#ifdef MEMBERS
/* electable: after a crash, with every server up and every message delivered, somebody can be
 * elected, or a leader lives. Else one crash has stopped the group for good with all disks intact. */
#define SUPPORTS(v, c)	(IN(v, CFG(c)) && (v == c || (IN(c, CFG(v)) && UPTODATE(c, v))))
#define CANWIN(c)	(IN(c, CFG(c)) && SUPPORTS(0, c) + SUPPORTS(1, c) + SUPPORTS(2, c) >= QUORUM(CFG(c)))
inline electable() {
	n = role[0] == LEADER || role[1] == LEADER || role[2] == LEADER || CANWIN(0) || CANWIN(1) || CANWIN(2);
	assert(n != 0);		/* somebody can be elected */
	n = 0
}
#endif

/* settle: what follows from a step without anybody's choice, done at once: replies leave, leaders
 * commit, state machines apply. Each of these may only be late in the program, never early, and
 * being early here gives the properties more to forbid and the steps more to do. */
inline settle() {
	for (w : 0 .. N-1) {
		durable(w, d);
		dur[w] = d;
		release(w)
	}
	for (w : 0 .. N-1) {
		if
		:: role[w] == LEADER -> advance(w)
		:: else
		fi
	}
	for (w : 0 .. N-1) { apply(w) }
#ifdef FENCE
	answers();
#endif
#ifdef MEMBERS
	electable();
#endif
#ifdef CATCHUP
	disksAgree();
#endif
	forget();
#ifdef BREADTH
	for (w : 0 .. N-1) { dur[w] = 0; lim[w] = 0 }
#endif
	w = 0; d = 0
}

inline lead(c) {
	if
	:: POP(votes[c] & CFG(c)) >= QUORUM(CFG(c)) ->
		assert(LDR(term[c]) == 0);	/* one leader a term (I5) */
		role[c] = LEADER; votes[c] = 0;
		LDR(term[c]) = c + 1;
		for (k : 1 .. M) { LOG(term[c], k) = MEM(c, k) }
		k = 0;
		printf("server %d leads term %d\n", c, term[c])
	:: else
	fi
}

/* A server asks for votes: the term rises and it votes for itself, both on disk at once. A leader
 * that gave up asks like any other. */
#define canAsk(s)	(up(s) && term[s] < T && IN(s, CFG(s)))
inline ask(s) {
	raiseTerm(s, term[s] + 1);
	voted[s] = s + 1;
	role[s] = CANDIDATE;
	votes[s] = 1 << s;
	printf("server %d asks for votes in term %d\n", s, term[s]);
	lead(s);
	settle()
}

/* s grants c its vote; granting and counting are one step, since between them c can only lose. A
 * grant that arrives late equals a grant never counted. c counts with its log in memory. */
#define canGrant(s, c)	(s != c && up(s) && up(c) && role[c] == CANDIDATE && IN(s, CFG(c)) && \
	(term[c] > term[s] || (term[c] == term[s] && voted[s] == 0)) && UPTODATE(c, s) KNOWS(s, c))
#ifdef MEMBERS			/* raft.go: a vote goes only to a voter of the own configuration */
#define KNOWS(s, c)	&& IN(c, CFG(s))
#else
#define KNOWS(s, c)
#endif
inline grant(s, c) {
	raiseTerm(s, term[c]);
	voted[s] = c + 1;
	votes[c] = votes[c] | (1 << s);
	printf("server %d votes for %d in term %d\n", s, c, term[c]);
	lead(c);
	settle()
}

/* s hears of a higher term: from a heartbeat, a refused vote, a reply. */
#define AT(k, t)	(term[k] == (t))
#define canHear(s, t)	(up(s) && term[s] < t && ANY(AT, t))
inline hear(s, t) {
	raiseTerm(s, t);
	printf("server %d hears of term %d\n", s, t);
	settle()
}

/* StoreLogs on the leader: the entry is queued, and flushed at once where the design says so. */
#define canAppend(s)	(up(s) && role[s] == LEADER && LEN(s) < M && qn[s] < Q)
inline append(s, kind) {
#ifdef SYNC1
	d = POP(CFG(s));	/* before the entry: a group of one voter stores synchronously */
#endif
	n = LEN(s) + 1;
	MEM(s, n) = ENTRY(term[s], kind);
	LOG(term[s], n) = MEM(s, n);
	push(s, n, MEM(s, n));
	printf("server %d queues entry %d of term %d, kind %d\n", s, n, term[s], kind);
	n = 0;
#ifdef SYNC1
	if
	:: d == 1 -> flushAll(s)
	:: else
	fi;
	d = 0;
#endif
#ifdef MEMBERS
#ifndef ASYNCCFG
	if
	:: kind != 0 -> flushAll(s)
	:: else
	fi;
#endif
#endif
	settle()
}

/* s handles an AppendEntries of the leader of t with entries up to e. Only e matters: when some
 * previous entry matches, all before it do (log matching), so entries from 1 on mean the same. */
#define DIFF(s, t, e)	((MEM(s,1) != LOG(t,1)) -> 1 : DIFF2(s, t, e))
#if M == 1
#define DIFF2(s, t, e)	0
#else
#define DIFF2(s, t, e)	(((e) > 1 && MEM(s,2) != LOG(t,2)) -> 2 : DIFF3(s, t, e))
#endif
#if M <= 2
#define DIFF3(s, t, e)	0
#else
#define DIFF3(s, t, e)	(((e) > 2 && MEM(s,3) != LOG(t,3)) -> 3 : 0)
#endif
#define NEED(s, t, e)	(DIFF(s,t,e) == 0 -> 0 : (e) + 1 - DIFF(s,t,e) + (LEN(s) >= DIFF(s,t,e)))
#define canStore(s, t, e)	(up(s) && LDR(t) != 0 && LDR(t) != s + 1 && t >= term[s] && LOG(t, e) != 0 && \
	qn[s] + NEED(s, t, e) <= Q)
inline store(s, t, e) {
	raiseTerm(s, t);
	i = DIFF(s, t, e);
	w = 0;			/* a configuration is among the new entries */
	if
	:: i == 0 -> printf("server %d sees a copy of 1..%d of term %d\n", s, e, t)
	:: else ->
		printf("server %d queues %d..%d from the leader of term %d\n", s, i, e, t);
		if
		:: LEN(s) >= i ->	/* DeleteRange: a record of its own, the mark falls with it */
			push(s, i, 0);
			for (k : 1 .. M) {
				if
				:: k >= i -> MEM(s, k) = 0
				:: else
				fi
			}
			drop(s, i)
		:: else
		fi;
		for (k : 1 .. M) {
			if
			:: k >= i && k <= e ->
				MEM(s, k) = LOG(t, k);
				push(s, k, MEM(s, k));
				w = w | KIND(MEM(s, k))
			:: else
			fi
		}
	fi;
	k = 0;
#ifdef MEMBERS
#ifndef ASYNCCFG
	if
	:: w != 0 -> flushAll(s)
	:: else
	fi;
#endif
#endif
	w = 0;
#if defined(NOGATE1)
	ACKED(t, s) = MAX(ACKED(t, s), e);
#elif defined(NODUP)
	if
	:: i == 0 -> ACKED(t, s) = MAX(ACKED(t, s), e)	/* mutation: nothing to store, nothing to wait for */
	:: else -> HELD(s, t) = MAX(HELD(s, t), e)
	fi;
#else
	HELD(s, t) = MAX(HELD(s, t), e);
#endif
	i = 0;
	settle()
}

/* s learns LeaderCommitIndex c from the leader of its term, in a message with entries up to c. */
#define canLearn(s, t, c)	(up(s) && role[s] == FOLLOWER && term[s] == t && c <= SENT(t) && c > commit[s] && \
	DIFF(s, t, c) == 0)
inline learn(s, c) {
	commit[s] = c;
	printf("server %d learns commit index %d\n", s, c);
	settle()
}

/* The process of s dies and comes back with what is on disk: a prefix of the queue did get there
 * (flush). The engine may have kept all that was applied: it must not be ahead of the log (H4). */
#define canCrash(s)	(crashes < CRASHES)
inline crash(s) {
	crashes++;
	durable(s, d);
	n = commit[s];
#ifndef NOGATE4
	n = MIN(n, d);
#endif
#ifndef NOH4
	assert(n <= DLEN(s));
#endif
	n = 0; d = 0;
	endInstance(s);
#ifdef CATCHUP
	crashedHandover(s);
#endif
	qn[s] = 0;
	for (j : 0 .. Q-1) { QREC(s, j) = 0 }
	for (j : 1 .. M) { MEM(s, j) = DISK(s, j) }
	j = 0;
#ifdef INDEXWAIT
	mark[s] = LEN(s);
#endif
#ifdef FRESHMARK
	fresh[s] = 0;
#endif
#if RESTARTS > 0
#ifdef HELDSURVIVES
	for (j : 1 .. T) { ORPHAN(s, j) = 0 }
	j = 0;
#endif
#endif
	printf("server %d crashes, entries left: %d\n", s, LEN(s));
	settle()
}

/* The Raft instance of s is closed and opened; the process stays, and with it log and queue. With
 * RELOG the log is reset, too: opened anew from what is on disk. */
#if RESTARTS > 0
#define ATSTAKE(s)	(HELD(s,1) + HELD(s,2) + HELD(s,T) > 0 || role[s] == LEADER || commit[s] > 0 || qn[s] > 0)
#define canRestart(s)	(restarts < RESTARTS && ATSTAKE(s))	/* else a restart changes nothing */
inline restart(s) {
	restarts++;
	endInstance(s);
#ifdef FRESHMARK
	fresh[s] = LEN(s);
#endif
#ifdef RELOG
	qn[s] = 0;
	for (j : 0 .. Q-1) { QREC(s, j) = 0 }
	for (j : 1 .. M) { MEM(s, j) = DISK(s, j) }
	j = 0;
#endif
	printf("instance of server %d restarts\n", s);
	settle()
}
#endif

#ifndef CATCHUP
#define up(s)	1
#endif
