package node

import "github.com/trivet-csi/trivet/internal/stage"

// with returns at with a kernel device on its data path, or without one and its overlay, and lets the stages of the
// path know.
// REQUIRES: the data path is open.
func (at *attached) with(k kernelDevice) *attached {
	if k == nil {
		at.path.stages.SetDevice(nil)
		return &attached{epoch: at.epoch, group: at.group, path: at.path}
	}
	at.path.stages.SetDevice(func() stage.DeviceSummary { return deviceOf(k) })
	return &attached{epoch: at.epoch, group: at.group, path: at.path, kernel: k, overlay: at.overlay}
}

// deviceOf says in the words of package stage what k is and has counted.
func deviceOf(k kernelDevice) stage.DeviceSummary {
	n, tells := k.Resent()
	return stage.DeviceSummary{Path: k.Path(), Tells: tells, Repeated: n.Repeated, Refused: n.Refused}
}
