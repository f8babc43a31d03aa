package engine

// awaitLevel0 waits while level 0 has too many sublevels, of which every read has to look into each, until compactions
// have made room. It is in the place of Pebble's own wait (L0StopWritesThreshold), which a failure of the engine does
// not end: whoever waits there keeps the lock of the commit pipeline, so nobody could close the engine any more.
// REQUIRES: the turn.
func (e *Engine) awaitLevel0() error {
	h := e.health
	if h.flushes.Load() < e.level0Until {
		return nil
	}
	for waits := false; ; {
		flushes := h.flushes.Load() // each adds one sublevel at most
		if n := uint64(e.db.Metrics().Levels[0].Sublevels); n < l0StopSublevel {
			e.level0Until = flushes + l0StopSublevel - n
			if waits {
				h.level0Waits(false)
			}
			return nil
		}
		if !waits {
			waits = true
			h.level0Waits(true)
		}
		select {
		case <-h.compacted:
		case <-h.failed:
			return h.check()
		}
	}
}

// level0Waits is told when writes begin to wait for level 0, and when they go on.
func (h *health) level0Waits(now bool) {
	h.l0Stalls.Store(now)
	if !now {
		h.log.Info("engine writes go on")
		return
	}
	h.log.Warn("engine writes wait for compactions: level 0 is full")
	h.checkStall()
}

// checkStall fails the engine when writes wait for level 0 and compactions do not get past damage: they would wait for
// ever, and with them whoever closes a volume. The owner was told before that all volumes have to go.
func (h *health) checkStall() {
	if h.l0Stalls.Load() && h.compactions.stuck() {
		h.fail(&DamageError{
			Last: volumeMax, Cause: "no more writes: level 0 is full, and compactions do not get past damage",
		})
	}
}
