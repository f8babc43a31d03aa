/*
 * catchup.pml: the hand-over at the end of a catch-up outside Raft. A follower's instance stops; it
 * pulls the blocks up to X, an index that the leader's state machine has applied; makes them, the
 * applied index and the configuration durable; replaces its log by "snapshot X"; starts; and only
 * then the leader's InstallSnapshot call is answered. A durable flag says "restoring" all the while
 * (H5): a process that finds it goes on with the transfer and starts no instance. "Snapshot X" is
 * written here as the entries 1..X themselves: their terms are what a log cut at X has to know.
 */
#define CATCHUP
#include "core.pml"

#define RUNNING		0	/* the Raft instance runs; flag clear */
#define PULLING		1	/* instance stopped, flag set, blocks on their way */
#define BLOCKS		2	/* blocks, applied index and configuration durable at X */
#define REPLACED	3	/* log replaced, or kept */

byte stage[N];		/* durable: the flag and what the disk shows of the progress */
byte xfer[N];		/* X */
byte call[N];		/* term of the leader whose call waits, 0 = none */
byte engine[N];		/* durable applied index that the hand-over wrote; before it: anything lower */
byte base[N];		/* the log begins after this index: below are only blocks */
byte handovers;

#define up(s)		(stage[s] == RUNNING)
#define NOPENDING(s, x)	((qn[s] < 1 || RECIDX(QREC(s,0)) > (x)) && (qn[s] < 2 || RECIDX(QREC(s,1)) > (x)) && \
			(qn[s] < 3 || RECIDX(QREC(s,2)) > (x)))
#define LEADEROF(t)	(LDR(t) - (LDR(t) > 0))	/* asked only where there is one */
#ifdef XQUEUED		/* mutation: X is any index of the leader's log */
byte image[N * M];	/* what the follower pulled */
#define XVALID(t, x)	(LOG(t, x) != 0)
#define ATX(s, i)	image[(s) * M + (i) - 1]
#else			/* what is applied is the same everywhere: chosen */
#define ATX(s, i)	CHOSEN(i)
/* X is applied at the leader (gates 2 and 4: committed, and on its disk) */
#define XVALID(t, x)	((x) <= commit[LEADEROF(t)] && NOPENDING(LEADEROF(t), x))
#endif

#define canBegin(s, t, x)	(handovers < 1 && up(s) && LDR(t) != 0 && LDR(t) != s + 1 && LEADS(LEADEROF(t), t) && \
	t >= term[s] && XVALID(t, x))
inline begin(s, t, x) {
	handovers++;
	raiseTerm(s, t);
	endInstance(s);
	stage[s] = PULLING; xfer[s] = x; call[s] = t;
#ifdef XQUEUED
	for (k : 1 .. M) { ATX(s, k) = LOG(t, k) }
	k = 0;
#endif
	printf("server %d stops its instance and pulls blocks up to %d\n", s, x);
	settle()
}

inline blocksDurable(s) {
	stage[s] = BLOCKS;
	engine[s] = xfer[s];
	printf("server %d: blocks durable at %d\n", s, xfer[s]);
	settle()
}

#ifdef ALWAYSREPLACE	/* mutation: entries above X are thrown away with the rest */
#define REPLACES(s)	true
#else
#define REPLACES(s)	(xfer[s] >= LEN(s) || MEM(s, xfer[s]) != ATX(s, xfer[s]))
#endif
inline replaceLog(s) {
	stage[s] = REPLACED;
	if
	:: REPLACES(s) ->
		for (k : 1 .. M) {
			MEM(s, k) = (k <= xfer[s] -> ATX(s, k) : 0);
			DISK(s, k) = MEM(s, k)
		}
		for (k : 0 .. Q-1) { QREC(s, k) = 0 }
		k = 0;
		qn[s] = 0;
		base[s] = xfer[s];
#ifdef VOTELOST		/* mutation: the new log comes without the vote */
		voted[s] = 0;
#endif
		printf("server %d replaces its log by %d\n", s, xfer[s])
	:: else -> printf("server %d keeps its log, which holds %d\n", s, xfer[s])
	fi;
	settle()
}

/* A log that was kept may hold X in its queue only, while the engine has X on disk: the flag must
 * stay until the log is there too, or a crash leaves the engine ahead of the log (H4). */
#ifdef NOKEEPWAIT	/* mutation */
#define canStart(s)	(stage[s] == REPLACED)
#else
#define canStart(s)	(stage[s] == REPLACED && NOPENDING(s, xfer[s]))
#endif
inline start(s) {
	printf("server %d starts and answers the call\n", s);
	stage[s] = RUNNING;
	if
	:: call[s] != 0 -> ACKED(call[s], s) = MAX(ACKED(call[s], s), xfer[s])
	:: else
	fi;
	call[s] = 0; xfer[s] = 0;
	settle()
}

/* The call dies with the process; the flag stays, and with it the work. */
inline crashedHandover(s) {
	call[s] = 0;
	if
#ifdef NOFLAG		/* mutation: the next process believes that all is well */
	:: stage[s] != RUNNING -> stage[s] = RUNNING; xfer[s] = 0
#else
	:: stage[s] == REPLACED -> stage[s] = BLOCKS
#endif
	:: else
	fi
}

/* An instance runs only over an engine that has what its log begins after, and a log that has all
 * that its engine applied. */
inline disksAgree() {
	for (x : 0 .. N-1) {
		assert(!up(x) || (base[x] <= engine[x] && engine[x] <= DLEN(x)))
	}
	x = 0
}

#define BEGIN(s, t, x)	:: d_step { canBegin(s, t, x) -> begin(s, t, x) }
#define HANDOVER(s)	PER_TERM(BEGIN, s) \
	:: d_step { stage[s] == PULLING -> blocksDurable(s) } \
	:: d_step { stage[s] == BLOCKS -> replaceLog(s) } \
	:: d_step { canStart(s) -> start(s) }
#define PROPOSALS(s)	:: d_step { canAppend(s) -> append(s, 0) }
#include "server.pml"
