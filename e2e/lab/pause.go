package lab

import (
	"fmt"
	"syscall"
)

// Pause stops a process of the control plane, as a machine that hangs would, and returns a function that lets it go on:
// kube-apiserver, etcd, kube-controller-manager or kube-scheduler.
func (c *Cluster) Pause(program string) (resume func() error, err error) {
	st, err := loadState(c.dir)
	if err != nil {
		return nil, err
	}
	if st == nil {
		return nil, fmt.Errorf("pause %s: no lab is up in %s", program, c.dir)
	}
	for _, p := range st.Processes {
		if p.Name != program || !p.alive() {
			continue
		}
		if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
			return nil, fmt.Errorf("pause %s: process %d: %w", program, p.PID, err)
		}
		return func() error {
			if err := syscall.Kill(p.PID, syscall.SIGCONT); err != nil {
				return fmt.Errorf("resume %s: process %d: %w", program, p.PID, err)
			}
			return nil
		}, nil
	}
	return nil, fmt.Errorf("pause %s: no such process of the lab", program)
}
