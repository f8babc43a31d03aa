package iothrottle

import (
	"math"
	"time"
)

// slack is how much budget an idle volume saves up in any case, as time at its full rate. It is short,
// so that the rate holds over any 10 s to within 1 %, and long enough to make up for late timers.
const slack = 100 * time.Millisecond

// bucket is a token bucket that may go into debt: a request is let through as soon as the
// bucket holds the request's cost, or slack's worth when the cost is more than that, and is
// then charged in full. So a request larger than a second's budget is still served, and those
// behind it pay. It is pure: time comes in as the duration since any fixed instant. Tokens are
// requests or bytes. The zero value is unlimited.
type bucket struct {
	rate   float64       // tokens per second; 0 = unlimited
	depth  float64       // most tokens it can hold
	tokens float64       // at instant at; negative = debt
	at     time.Duration // when tokens was computed
}

// setRate changes the rate from now on, and how much an idle volume saves up beyond slack. Debt stays
// and is paid at the new rate. A bucket that was unlimited begins with slack: credit has to be earned, or
// whoever attaches anew, or sets a limit anew, would have it for nothing.
func (b *bucket) setRate(now time.Duration, perSec int64, credit time.Duration) {
	b.fill(now)
	wasUnlimited := b.rate == 0
	b.rate = float64(max(perSec, 0))
	b.depth = max(b.rate*(slack+max(credit, 0)).Seconds(), 1)
	if wasUnlimited {
		b.tokens = max(b.rate*slack.Seconds(), 1)
	}
	b.tokens = min(b.tokens, b.depth)
	b.at = now
}

// fill adds what has accrued since the last call.
func (b *bucket) fill(now time.Duration) {
	if b.rate > 0 && now > b.at {
		b.tokens = min(b.tokens+(now-b.at).Seconds()*b.rate, b.depth)
		b.at = now
	}
}

// wait returns how long from now a request of the given cost must wait; 0 = it may go. The
// result is never short: after waiting that long, with no other request, wait returns 0.
func (b *bucket) wait(now time.Duration, cost float64) time.Duration {
	if b.rate == 0 {
		return 0
	}
	b.fill(now)
	// What a request must find is at most slack's worth, however much may be saved up.
	missing := min(cost, max(b.rate*slack.Seconds(), 1)) - b.tokens
	if missing <= tokenSlack*b.depth {
		return 0
	}
	// A debt may be centuries deep at one byte a second: keep the product within Duration.
	return time.Duration(min(math.Ceil(missing/b.rate*float64(time.Second)), float64(waitMax)))
}

// tokenSlack is the part of a bucket that rounding may cost; without it a waiter could wake a
// few times for the last billionth of a token.
const tokenSlack = 1e-9

// waitMax bounds one wait; the waiter asks again afterwards.
const waitMax = time.Hour

// take charges a request. Call it only when wait returned 0 for the same instant.
func (b *bucket) take(cost float64) {
	if b.rate > 0 {
		b.tokens -= cost
	}
}

// giveBack undoes a take of a request that did not go after all.
func (b *bucket) giveBack(cost float64) {
	if b.rate > 0 {
		b.tokens = min(b.tokens+cost, b.depth)
	}
}
