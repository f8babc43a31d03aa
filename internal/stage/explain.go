package stage

import (
	"fmt"
	"strings"
	"time"
)

// Input is what Explain decides by.
type Input struct {
	Name     string            // of the volume, for the commands in the advice
	Params   map[string]string // canonical
	Attached string            // node; empty = none
	Windows  []Window          // of every node that serves the volume
}

// Finding is what limits a volume.
type Finding struct {
	Stage  string // empty = nothing does
	Node   string // where that stage is
	Reason string // with the figures
	Advice string // the setting that would help, and how
}

const (
	// fewN is below how many requests a window says nothing.
	fewN = 20
	// idleBelow is the mean number of requests under way below which the user of the volume, who leaves it
	// idle for most of the time, is what limits it.
	idleBelow = 0.5
	// heldShare is from which share of the time of all requests on a stage that holds them back on purpose is
	// named, whatever else is slow: to lift what is behind it would change nothing.
	heldShare = 0.3
)

// part is a stage with the requests that are in it at a time and in no stage below it.
type part struct {
	Summary
	own float64
}

// Explain says which stage limits a volume. It is pure. By Little's law the time that requests spend in a
// stage is seen in how many are in it at a time, so the stage that holds most of them is the one to look at;
// what contains another stage counts without it.
func Explain(in Input) Finding {
	all := merge(in.Windows)
	var n uint64
	var under, writes float64 // requests under way
	for _, s := range []Stage{Read, Write, Discard, Flush} {
		m := all[s]
		n += m.Count
		under += m.Little
		if s != Read {
			writes += m.Little
		}
	}
	switch {
	case n < fewN:
		return Finding{Reason: fmt.Sprintf("only %d requests were answered, too few to say anything", n)}
	case all[Throttle].Little >= heldShare*under:
		return throttled(&in, all, under)
	case all[Scheduler].Little >= heldShare*under:
		return outranked(&in, all[Scheduler], "the other volumes of node "+all[Scheduler].Node, under)
	case all[DiskTurn].Little >= heldShare*under:
		return outranked(&in, all[DiskTurn], "other volumes that lead on the same disk of node "+all[DiskTurn].Node, under)
	case under < idleBelow:
		return Finding{Reason: fmt.Sprintf("%.2f requests were under way at a time: the volume waited for its user most of "+
			"the time", under), Advice: "nothing here is slow; more requests at a time would get more done"}
	case writes*2 >= under && in.Params["cacheMode"] == "writeBack" && all[WriteBack].Stage != "":
		return cached(&in, all, under)
	case writes*2 >= under:
		return slowest(&in, writeParts(all), under)
	}
	return slowest(&in, readParts(all), under)
}

// merge returns one Summary a stage: of followers, which work side by side, the one with the most in it.
func merge(windows []Window) [stageN]Summary {
	var all [stageN]Summary
	for _, w := range windows {
		for _, s := range w.Stages {
			for i := range stageN {
				if names[i] == s.Stage && (all[i].Stage == "" || s.Little > all[i].Little) {
					all[i] = s
				}
			}
		}
	}
	return all
}

func share(s Summary, under float64) string {
	return fmt.Sprintf("%.0f%% of the time of all requests, %s each on average (standard deviation %s)",
		100*min(s.Little/under, 1), text(s.Mean), text(s.StdDev))
}

func text(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(100 * time.Nanosecond).String()
}

// throttled names the limits that are nearest to what was reached.
func throttled(in *Input, all [stageN]Summary, under float64) Finding {
	f := Finding{Stage: Throttle.String(), Node: all[Throttle].Node}
	f.Reason = "requests are held back by the volume's own limits for " + share(all[Throttle], under)
	reads, writes := all[Read], all[Write]
	seconds := 1.0
	for _, w := range in.Windows {
		if w.Node == f.Node && w.Seconds > 0 {
			seconds = w.Seconds
		}
	}
	others := all[Discard].DepartureRate
	rate := map[string]float64{
		"iopsLimit":           reads.DepartureRate + writes.DepartureRate + others,
		"readIopsLimit":       reads.DepartureRate,
		"writeIopsLimit":      writes.DepartureRate + others,
		"bandwidthLimit":      float64(reads.Bytes+writes.Bytes) / seconds,
		"readBandwidthLimit":  float64(reads.Bytes) / seconds,
		"writeBandwidthLimit": float64(writes.Bytes) / seconds,
	}
	best, most := "", 0.0
	for _, key := range []string{
		"iopsLimit", "readIopsLimit", "writeIopsLimit", "bandwidthLimit", "readBandwidthLimit", "writeBandwidthLimit",
	} {
		var limit float64
		if _, err := fmt.Sscan(in.Params[key], &limit); err != nil || limit <= 0 {
			continue
		}
		if used := rate[key] / limit; used > most {
			best, most = key, used
		}
	}
	if best == "" {
		f.Advice = "the limit was lifted a moment ago; look again"
		return f
	}
	f.Reason += fmt.Sprintf("; %.0f%% of %s=%s was used", 100*most, best, in.Params[best])
	f.Advice = fmt.Sprintf("trivet volume set %s %s=MORE, or burst=SECONDS if the load comes in bursts", in.Name, best)
	return f
}

func outranked(in *Input, held Summary, others string, under float64) Finding {
	return Finding{
		Stage: held.Stage, Node: held.Node,
		Reason: "requests wait for " + others + " for " + share(held, under),
		Advice: fmt.Sprintf("trivet volume set %s priority=MORE or iopsReservation=N; or limit the other volumes", in.Name),
	}
}

// cached is for writes that a cache answers: what is below it counts as far as anybody waits for it, which is for room
// and in flushes.
func cached(in *Input, all [stageN]Summary, under float64) Finding {
	room, flush := all[CacheRoom], all[Flush]
	if room.Little+flush.Little < heldShare*under {
		return Finding{
			Stage: Cache.String(), Node: all[Cache].Node,
			Reason: fmt.Sprintf("writes are answered from the memory of node %s, %s each; of %.2f requests under way at a "+
				"time, %.2f wait for room in the cache and %.2f are flushes", all[Cache].Node, text(all[Cache].Mean), under,
				room.Little, flush.Little),
			Advice: "nothing below holds them up; a faster CPU, or more requests at a time, would get more done",
		}
	}
	f := slowest(in, writeParts(all), under)
	if f.Stage == "" { // what is below did not answer
		f.Stage, f.Node = WriteBack.String(), all[WriteBack].Node
	}
	if room.Little >= flush.Little {
		f.Reason = "writes wait for room in the cache for " + share(room, under) + "; " + f.Reason
		if f.Advice != "" {
			f.Advice += "; "
		}
		f.Advice += fmt.Sprintf("a larger cacheSize (trivet volume set %s cacheSize=MORE) takes longer bursts, and no more "+
			"than that", in.Name)
	} else {
		f.Reason = "flushes wait for write-backs for " + share(flush, under) + "; " + f.Reason
	}
	return f
}

// writeParts returns what a write goes through.
func writeParts(all [stageN]Summary) []part {
	network := part{all[Network], all[Network].Little}
	if f := all[FollowerLog]; f.Count > 0 {
		// One answer of one follower in the mean: what its log takes of that is not the network's.
		network.own = all[Network].ArrivalRate * max(all[Network].Mean-f.Mean, 0)
	}
	return []part{
		{all[Queue], all[Queue].Little},
		{all[LeaderLog], all[LeaderLog].Little},
		network,
		{all[FollowerLog], all[FollowerLog].Little},
		{all[Apply], all[Apply].Little},
	}
}

// readParts returns what a read goes through. What the leader does not take is the way to it.
func readParts(all [stageN]Summary) []part {
	way := all[Replication]
	way.Stage = Network.String()
	return []part{
		{all[ServeRead], all[ServeRead].Little},
		{way, max(way.Little-all[ServeRead].Little-writesBelow(all), 0)},
		{all[Cache], max(all[Cache].Little-all[CacheRoom].Little, 0)},
	}
}

// writesBelow is how many of the requests below the cache are writes.
func writesBelow(all [stageN]Summary) float64 {
	total := all[Read].Little + all[Write].Little + all[Discard].Little + all[Flush].Little
	if total == 0 {
		return 0
	}
	return all[Replication].Little * (1 - all[Read].Little/total)
}

// slowest names the part that holds most of the requests.
func slowest(in *Input, parts []part, under float64) Finding {
	var queue part
	best := part{own: -1}
	for _, p := range parts {
		switch {
		case p.Stage == Queue.String():
			queue = p // a symptom: requests wait there for what is behind it
		case p.own > best.own:
			best = p
		}
	}
	if best.own <= 0 {
		return Finding{Reason: fmt.Sprintf("%.1f requests were under way at a time, but no stage below was in use: is the "+
			"leader's node among those that did not answer?", under)}
	}
	f := Finding{Stage: best.Stage, Node: best.Node}
	f.Reason = fmt.Sprintf("%.2f are in %s on node %s at a time, %s each (standard deviation %s, 99%% within %s), "+
		"in use for %.0f%% of the time", best.own, best.Stage, best.Node, text(best.Mean), text(best.StdDev), text(best.P99),
		100*best.Utilisation)
	if queue.own > best.own {
		f.Reason += fmt.Sprintf("; %.1f requests wait in the queue before it, %s each", queue.own, text(queue.Mean))
	}
	if c := cacheOf(in.Windows); c != nil && best.Stage == ServeRead.String() && c.Hits+c.Misses > 0 {
		hits := 100 * float64(c.Hits) / float64(c.Hits+c.Misses)
		f.Reason += fmt.Sprintf("; %.0f%% of the blocks were found in the cache", hits)
	}
	f.Advice = advice(in, best.Stage, best.Node)
	return f
}

// cacheOf returns what the cache of the attachment did, or nil.
func cacheOf(windows []Window) *CacheSummary {
	for _, w := range windows {
		if w.Cache != nil {
			return w.Cache
		}
	}
	return nil
}

func advice(in *Input, stage, node string) string {
	writeBack := ""
	if in.Params["cacheMode"] != "writeBack" {
		writeBack = "; where the program can do with fewer flushes, cacheMode=writeBack"
	}
	var b strings.Builder
	switch stage {
	case LeaderLog.String():
		fmt.Fprintf(&b, "the disk of %s is slow to flush: start the servers with --overlap-flush, move the leader (trivet "+
			"volume move-leader %s NODE) or use a faster disk there%s", node, in.Name, writeBack)
	case FollowerLog.String():
		fmt.Fprintf(&b, "the disk of %s is slow to flush: trivet replica move %s %s NODE, or a faster disk there%s", node,
			in.Name, node, writeBack)
	case Network.String():
		if in.Attached != "" && node != in.Attached {
			fmt.Fprintf(&b, "trivet volume move-leader %s %s saves a way over the network; ", in.Name, in.Attached)
		}
		fmt.Fprintf(&b, "bring the replicas closer together (trivet replica move), or use a faster network%s", writeBack)
	case Apply.String():
		fmt.Fprintf(&b, "the engine of %s is short of CPU or of disk: move a replica of another volume away (trivet replica "+
			"move), or lower catch-up (--catch-up-bandwidth)", node)
	case ServeRead.String():
		fmt.Fprintf(&b, "the disk of %s is slow to read: a larger cacheSize, more readAhead for sequential reads, or "+
			"readConsistency=session for reads beside the pod", node)
	case Cache.String():
		fmt.Fprintf(&b, "reads are answered from the memory of %s; more requests at a time would get more done", node)
	default:
		return ""
	}
	return b.String()
}
