/*
 * state.pml: bounds, entries, and the state of the group. Included by core.pml.
 */
#ifndef N
#define N 3		/* servers 0..N-1; 2, 3 or 5 */
#endif
#ifndef M
#define M 2		/* log indexes 1..M; 1, 2 or 3 */
#endif
#ifndef T
#define T 3		/* terms 1..T; at most 3, a term has two bits in an entry */
#endif
#ifndef Q
#define Q 3		/* records that the queue of a log holds; a full queue blocks */
#endif
#ifndef CRASHES
#define CRASHES 1	/* crashes in all, of any server */
#endif
#ifndef RESTARTS
#define RESTARTS 0	/* restarts of a Raft instance whose process and log live on */
#endif
#ifndef INITCFG
#define INITCFG 7	/* voters at the start, one bit each; everyone else is a learner */
#endif

/* An entry is its term and a kind; 0 is no entry. (index, term) names one entry, since a
 * term has one leader (asserted below) which never writes an index twice. */
#define ENTRY(t, k)	((t) + 4 * (k))
#define TERM(x)		((x) & 3)
#define KIND(x)		((x) >> 2)
/* A record of the queue: index and entry; entry 0 is the truncation from that index on. */
#define REC(i, x)	((i) * 32 + (x))
#define RECIDX(r)	((r) / 32)
#define RECENT(r)	((r) % 32)

#define POP(m)		(((m) & 1) + (((m) >> 1) & 1) + (((m) >> 2) & 1) + (((m) >> 3) & 1) + (((m) >> 4) & 1))
#define QUORUM(m)	(POP(m) / 2 + 1)
#define IN(s, m)	(((m) >> (s)) & 1)
#define MIN(a, b)	((a) < (b) -> (a) : (b))
#define MAX(a, b)	((a) > (b) -> (a) : (b))

#define FOLLOWER	0
#define CANDIDATE	1
#define LEADER		2

/* Arrays of two dimensions, indexes from 1. */
#define MEM(s, i)	mem[(s) * M + (i) - 1]
#define DISK(s, i)	disk[(s) * M + (i) - 1]
#define QREC(s, j)	queue[(s) * Q + (j)]
#define HELD(s, t)	held[(s) * T + (t) - 1]
#define LOG(t, i)	termlog[((t) - 1) * M + (i) - 1]
#define ACKED(t, s)	acked[((t) - 1) * N + (s)]
#define SENT(t)		sent[(t) - 1]
#define LDR(t)		ldr[(t) - 1]
#define CHOSEN(i)	chosen[(i) - 1]

#if M == 1
#define LEN(s)	(MEM(s,1) != 0)
#define DLEN(s)	(DISK(s,1) != 0)
#elif M == 2
#define LEN(s)	((MEM(s,1) != 0) + (MEM(s,2) != 0))
#define DLEN(s)	((DISK(s,1) != 0) + (DISK(s,2) != 0))
#define LASTCFG(s)	(KIND(MEM(s,2)) -> KIND(MEM(s,2)) : (KIND(MEM(s,1)) -> KIND(MEM(s,1)) : INITCFG))
#define CFGIDX(s)	(KIND(MEM(s,2)) -> 2 : (KIND(MEM(s,1)) -> 1 : 0))
#else
#define LEN(s)	((MEM(s,1) != 0) + (MEM(s,2) != 0) + (MEM(s,3) != 0))
#define DLEN(s)	((DISK(s,1) != 0) + (DISK(s,2) != 0) + (DISK(s,3) != 0))
#define LASTCFG(s)	(KIND(MEM(s,3)) -> KIND(MEM(s,3)) : (KIND(MEM(s,2)) -> KIND(MEM(s,2)) : \
			(KIND(MEM(s,1)) -> KIND(MEM(s,1)) : INITCFG)))
#define CFGIDX(s)	(KIND(MEM(s,3)) -> 3 : (KIND(MEM(s,2)) -> 2 : (KIND(MEM(s,1)) -> 1 : 0)))
#endif
#ifdef NOGATE2
#define GATE2(l, i)	true
#else
#define GATE2(l, i)	(dur[l] >= (i))
#endif
#ifdef MEMBERS			/* kinds are configurations: the voters */
#define CFG(s)	LASTCFG(s)
#else
#define CFG(s)	INITCFG
#endif

/* LASTTERM indexes the log by its length; the -> : form evaluates one side only. */
#define LASTTERM(s)	(LEN(s) == 0 -> 0 : TERM(MEM(s, LEN(s))))
#define UPTODATE(c, v)	(LASTTERM(c) > LASTTERM(v) || (LASTTERM(c) == LASTTERM(v) && LEN(c) >= LEN(v)))

/* Durable state: term and vote (synchronous), disk. */
byte term[N], voted[N];		/* voted: server + 1, 0 = nobody in this term */
byte disk[N * M];		/* the log as a crash would leave it */
/* Volatile state of a process. */
byte mem[N * M];		/* the log as Raft sees it: disk with the queue done */
byte queue[N * Q], qn[N];	/* records not on disk yet, in order */
byte held[N * T];		/* gate 1: highest index of the replies held for the leader of a term */
byte role[N], votes[N], commit[N];
#ifdef INDEXWAIT
byte mark[N];			/* mutation: highest index ever flushed, never rewound */
#endif
#ifdef FRESHMARK
byte fresh[N];			/* mutation: a new instance takes the log it finds for durable */
#endif
#if RESTARTS > 0
#ifdef HELDSURVIVES
byte orphan[N * T];		/* mutation: replies held for an instance that is gone */
#define ORPHAN(s, t)	orphan[(s) * T + (t) - 1]
#endif
#endif
/* The network: whatever was sent may arrive at any time, twice, or never. A leader only
 * appends within its term, so all its AppendEntries are prefixes of one log. */
byte termlog[T * M];		/* per term: its leader's log at its longest */
byte sent[T];			/* per term: highest LeaderCommitIndex sent */
byte acked[T * N];		/* per term and server: highest index a reply that left confirmed */
byte ldr[T];			/* per term: its leader + 1 */
/* What the outside knows. */
byte chosen[M];			/* entry that some state machine applied at an index */
byte crashes, restarts;

/* Scratch of a step, not state. A breadth-first search knows no hidden variables: there they are
 * state, and settle leaves them at 0. */
#ifdef BREADTH
#define hidden
#endif
hidden byte i, j, k, x, u, w, n, d;
hidden byte dur[N], lim[N];
