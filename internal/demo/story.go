package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const (
	volumeBytes = 1 << 30
	smallFileN  = 16
	smallBytes  = 1 << 20
	copyBytes   = 96 << 20
)

// volumeView is what the demo reads of `trivet volume show -o json`.
type volumeView struct {
	ID       string `json:"id"`
	Phase    string `json:"phase"`
	Replicas []struct {
		Node    string `json:"node"`
		Leader  bool   `json:"leader"`
		Applied uint64 `json:"applied"`
		Commit  uint64 `json:"commit"`
	} `json:"replicas"`
}

func (v volumeView) leader() string {
	for _, r := range v.Replicas {
		if r.Leader {
			return r.Node
		}
	}
	return ""
}

// story tells the demo step by step.
func (d *demo) story(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		d.startCluster, d.createVolume, d.attachToWriter, d.writeSmallFiles, d.killLeaderDuringCopy, d.restartDead,
		d.limitLive, d.killWriterDuringCopy, d.flipBit, d.loseFiles, d.restoreInPlace, d.moveToAnotherNode,
		d.deleteVolume,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) startCluster(ctx context.Context) error {
	names := []string{"node-a", "node-b", "node-c"}
	d.say("make a certificate authority and a certificate for each of %s", strings.Join(names, ", "))
	if err := d.makeCerts(ctx, names); err != nil {
		return err
	}
	d.say("start a keeper, and three servers, each with its own data directory")
	if err := d.startKeeper(); err != nil {
		return err
	}
	addresses, err := freeAddresses(ctx, len(names))
	if err != nil {
		return err
	}
	for i, name := range names {
		d.servers = append(d.servers, &server{name: name, address: addresses[i]})
	}
	for _, s := range d.servers {
		if err := d.start(s); err != nil {
			return err
		}
		note("%s: pid %d on %s", s.name, s.cmd.Process.Pid, s.address)
	}
	d.say("trivet cluster init, and wait until three nodes are voters of the catalogue")
	first := d.servers[0]
	err = until(ctx, "the first server accepts cluster init", func() (bool, error) {
		var born struct{ Cluster string }
		err := d.ask(ctx, first, &born, "cluster", "init")
		return err == nil, err
	})
	if err != nil {
		return err
	}
	return until(ctx, "three nodes are voters", func() (bool, error) {
		var status struct {
			Nodes []struct{ State, Role string }
		}
		if err := d.ask(ctx, first, &status, "cluster", "status"); err != nil {
			return false, err
		}
		voters := 0
		for _, n := range status.Nodes {
			if n.State == "Up" && (n.Role == "Leader" || n.Role == "Voter") {
				voters++
			}
		}
		return voters == len(d.servers), nil
	})
}

func (d *demo) createVolume(ctx context.Context) error {
	d.say("CSI CreateVolume: 1 GiB, 3 replicas, write-back cache")
	resp, err := csi.NewControllerClient(d.servers[0].conn).CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name:               "demo",
		CapacityRange:      &csi.CapacityRange{RequiredBytes: volumeBytes},
		VolumeCapabilities: []*csi.VolumeCapability{capability()},
		Parameters:         map[string]string{"replicas": "3", "cacheMode": "writeBack"},
	})
	if err != nil {
		return fmt.Errorf("CreateVolume: %w", err)
	}
	d.volume = resp.GetVolume()
	note("volume %s", d.volume.GetVolumeId())
	return nil
}

// attachToWriter gives the volume to node-c and lets node-a lead, so that the death of the leader
// is not the death of the writer.
func (d *demo) attachToWriter(ctx context.Context) error {
	d.say("CSI ControllerPublish, NodeStage (ext4) and NodePublish on node-c")
	if err := d.publish(ctx, d.server("node-c")); err != nil {
		return err
	}
	d.say("trivet volume move-leader demo node-a: the leader is not where the pod is")
	if err := d.letLead(ctx, "node-a"); err != nil {
		return err
	}
	note("led by node-a")
	return nil
}

// letLead moves the leadership to a node, and returns once it is there.
func (d *demo) letLead(ctx context.Context, node string) error {
	return until(ctx, node+" leads", func() (bool, error) {
		var v volumeView
		err := d.ask(ctx, d.server("node-c"), &v, "volume", "move-leader", "demo", node)
		return v.leader() == node, err
	})
}

func (d *demo) writeSmallFiles(ctx context.Context) error {
	d.say("write %d files of 1 MiB into %s, fsync each, keep their checksums", smallFileN, d.target())
	for i := range smallFileN {
		if _, err := d.writeFile(ctx, fmt.Sprintf("small-%02d", i), smallBytes, nil); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) killLeaderDuringCopy(ctx context.Context) error {
	d.say("copy %d MiB with an fsync after each MiB; in the middle, SIGKILL the leader's process", copyBytes>>20)
	dead := d.server("node-a")
	var killed time.Time
	pause, err := d.writeFile(ctx, "large", copyBytes, func(written int64) error {
		if written < copyBytes/2 || !killed.IsZero() {
			return nil
		}
		if err := d.letLead(ctx, dead.name); err != nil { // a disk that was busy for seconds has had another one elected
			return err
		}
		killed = time.Now()
		return dead.end(syscall.SIGKILL)
	})
	if err != nil {
		return fmt.Errorf("the copy broke: %w", err)
	}
	if dead.running() || killed.IsZero() {
		return errors.New("the leader was not killed")
	}
	note("the copy finished; the longest pause of a write or fsync was %d ms", pause.Milliseconds())
	// A replica that answers slowly is shown as the catalogue has it.
	var v volumeView
	err = until(ctx, "another node leads", func() (bool, error) {
		v = volumeView{}
		err := d.ask(ctx, d.server("node-c"), &v, "volume", "show", "demo")
		return v.leader() != dead.name && v.leader() != "", err
	})
	if err != nil {
		return err
	}
	note("led by %s now", v.leader())
	return nil
}

func (d *demo) restartDead(ctx context.Context) error {
	d.say("start node-a again and watch it catch up")
	if err := d.start(d.server("node-a")); err != nil {
		return err
	}
	began, behind := time.Now(), uint64(0)
	err := until(ctx, "node-a has caught up", func() (bool, error) {
		applied, commit, err := d.progress(ctx, "node-a")
		if applied > 0 && behind == 0 {
			behind = commit - applied
		}
		return applied > 0 && applied == commit, err
	})
	if err != nil {
		return err
	}
	note("it came back %d log entries behind and was level after %d ms", behind, time.Since(began).Milliseconds())
	return nil
}

// progress returns how far the replica on a node is, 0 when it does not say, and how far the volume is.
func (d *demo) progress(ctx context.Context, node string) (applied, commit uint64, err error) {
	var v volumeView
	if err := d.ask(ctx, d.server("node-b"), &v, "volume", "show", "demo"); err != nil {
		return 0, 0, err
	}
	for _, r := range v.Replicas {
		commit = max(commit, r.Commit)
		if r.Node == node {
			applied = r.Applied
		}
	}
	return applied, commit, nil
}

func (d *demo) moveToAnotherNode(ctx context.Context) error {
	d.say("bring the volume to node-b")
	if err := d.publish(ctx, d.server("node-b")); err != nil {
		return err
	}
	d.say("verify every checksum on node-b")
	if err := d.verify(); err != nil {
		return err
	}
	note("%d files, every byte as it was flushed", len(d.sums))
	return nil
}

func (d *demo) deleteVolume(ctx context.Context) error {
	d.say("unpublish; delete the snapshot and the volume")
	if err := d.unpublish(ctx, d.server("node-b")); err != nil {
		return err
	}
	if err := d.dropSnapshot(ctx); err != nil {
		return err
	}
	_, err := csi.NewControllerClient(d.servers[1].conn).DeleteVolume(ctx,
		&csi.DeleteVolumeRequest{VolumeId: d.volume.GetVolumeId()})
	if err != nil {
		return fmt.Errorf("DeleteVolume: %w", err)
	}
	var left []volumeView
	if err := d.askAgain(ctx, d.servers[1], &left, "volume", "list"); err != nil {
		return err
	}
	if len(left) != 0 {
		return fmt.Errorf("after its deletion %d volume is left in phase %s", len(left), left[0].Phase)
	}
	return nil
}

// leaveNothing stops the servers and checks that no mount or loop device of the demo is left.
func (d *demo) leaveNothing() error {
	d.say("stop the servers and look for anything left behind")
	var errs []error
	for _, s := range d.servers {
		errs = append(errs, s.end(syscall.SIGTERM))
		if s.conn != nil {
			errs = append(errs, s.conn.Close())
		}
	}
	errs = append(errs, d.stopKeeper())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	errs = append(errs, until(ctx, "nothing is left", func() (bool, error) { // the kernel frees loop devices lazily
		err := d.leftovers(ctx)
		return err == nil, err
	}))
	return errors.Join(errs...)
}

// leftovers reports the mounts and loop devices of the demo that are there.
func (d *demo) leftovers(ctx context.Context) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.dir) {
			errs = append(errs, fmt.Errorf("left a mount: %s", strings.TrimSpace(line)))
		}
	}
	loops, err := exec.CommandContext(ctx, "losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").Output()
	if err != nil {
		errs = append(errs, fmt.Errorf("losetup: %w", err))
	}
	if strings.Contains(string(loops), d.dir) {
		errs = append(errs, fmt.Errorf("left a loop device: %s", loops))
	}
	return errors.Join(errs...)
}

func (d *demo) target() string { return filepath.Join(d.dir, "pod", "data") }
