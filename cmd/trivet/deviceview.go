package main

import "fmt"

// deviceView is the kernel device of a volume on a node in `trivet volume explain -o json`. The counts are those since
// the server has the device; without tells they mean nothing.
type deviceView struct {
	Node     string `json:"node"`
	Path     string `json:"path"`
	Tells    bool   `json:"tells"`
	Repeated uint64 `json:"repeated"`
	Refused  uint64 `json:"refused"`
}

// text is the device in a line.
func (d *deviceView) text() string {
	s := fmt.Sprintf("device: %s on %s", d.Path, d.Node)
	if d.Tells && d.Repeated+d.Refused > 0 {
		s += fmt.Sprintf("; sent again by the kernel after a resume: %d requests repeated, %d refused", d.Repeated, d.Refused)
	}
	return s + "\n"
}
