package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	pageBytes    = 4096
	flippedFile  = "flipped"
	flippedBytes = 16 * pageBytes
	snapshotName = "before"
)

// flipBit damages one block on the disk of one node, behind its server's back, and has a scrub find and repair it.
func (d *demo) flipBit(ctx context.Context) error {
	d.say("flip one bit of a file's data on the disk of node-b, and trivet volume scrub demo --wait")
	data := make([]byte, flippedBytes)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	if err := d.writeWhole(flippedFile, data); err != nil {
		return err
	}
	// It is on a majority of the disks, of which node-b's need not be one yet.
	var at string
	err := until(ctx, "it is on node-b's disk", func() (done bool, err error) {
		at, err = flipOnDisk(filepath.Join(d.dir, "node-b", "data"), data[:pageBytes])
		return err == nil, err
	})
	if err != nil {
		return err
	}
	note("flipped in %s", at)
	found, err := d.scrub(ctx)
	if err != nil {
		return err
	}
	if found.Found != 1 || found.Repaired != 1 || found.Left != 0 {
		return fmt.Errorf("the scrub found %d damaged blocks and repaired %d, want 1", found.Found, found.Repaired)
	}
	note("%d MiB read on three disks; found 1 damaged block, repaired it from the others", found.CheckedBytes>>20)
	return nil
}

// scrubbed is what the demo reads of `trivet volume scrub -o json`.
type scrubbed struct {
	CheckedBytes          int64
	Found, Repaired, Left int64
	Absent                []string `json:"absentNodes"`
}

// scrub scrubs the volume, once more if a replica was busy and took no part, and returns the sum.
func (d *demo) scrub(ctx context.Context) (sum scrubbed, err error) {
	err = until(ctx, "all replicas were scrubbed", func() (bool, error) {
		var one scrubbed
		if err := d.ask(ctx, d.server("node-c"), &one, "volume", "scrub", "demo", "--wait"); err != nil {
			return false, err
		}
		sum.CheckedBytes += one.CheckedBytes
		sum.Found += one.Found
		sum.Repaired += one.Repaired
		sum.Left = one.Left
		return len(one.Absent) == 0, nil
	})
	return sum, err
}

// writeWhole writes a small file of the pod and keeps its checksum.
func (d *demo) writeWhole(name string, data []byte) error {
	f, err := os.OpenFile(filepath.Join(d.target(), name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	sum := sha256.Sum256(data)
	d.sums[name] = hex.EncodeToString(sum[:])
	return errors.Join(err, f.Sync(), f.Close())
}

// flipOnDisk looks for a page in the files below dir, which hold blocks in whole pages, and flips one bit of it.
func flipOnDisk(dir string, page []byte) (where string, err error) {
	buf := make([]byte, 256*pageBytes)
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || where != "" {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for off := int64(0); ; off += int64(len(buf)) {
			n, _ := f.ReadAt(buf, off) // what cannot be read does not hold the page
			for at := 0; at+pageBytes <= n; at += pageBytes {
				if bytes.Equal(buf[at:at+pageBytes], page) {
					where = fmt.Sprintf("%s at byte %d", filepath.Base(path), off+int64(at))
					_, err := f.WriteAt([]byte{page[7] ^ 1}, off+int64(at)+7)
					return errors.Join(err, f.Sync())
				}
			}
			if n < len(buf) {
				return nil
			}
		}
	})
	if err == nil && where == "" {
		err = fmt.Errorf("no file below %s holds the block", dir)
	}
	return where, err
}

// loseFiles takes a snapshot under the pod, and removes all that it wrote.
func (d *demo) loseFiles(ctx context.Context) error {
	d.say("trivet snapshot create demo %s, while the pod has it mounted; then remove every file", snapshotName)
	var s struct{ HeldSeconds float64 }
	if err := d.askAgain(ctx, d.server("node-c"), &s, "snapshot", "create", "demo", snapshotName); err != nil {
		return err
	}
	note("writes were held for %.1f ms", s.HeldSeconds*1000)
	for name := range d.sums {
		if err := os.Remove(filepath.Join(d.target(), name)); err != nil {
			return err
		}
	}
	dir, err := os.Open(d.target())
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// restoreInPlace brings the detached volume back to the snapshot.
func (d *demo) restoreInPlace(ctx context.Context) error {
	d.say("detach, and trivet snapshot restore --in-place --yes %s", snapshotName)
	if err := d.unpublish(ctx, d.server("node-c")); err != nil {
		return err
	}
	var v volumeView
	return d.askAgain(ctx, d.server("node-c"), &v, "snapshot", "restore", "--in-place", "--yes", snapshotName)
}

// dropSnapshot deletes the snapshot, and waits until it is gone.
func (d *demo) dropSnapshot(ctx context.Context) error {
	return until(ctx, "the snapshot is gone", func() (bool, error) {
		_, err := d.trivet(ctx, "snapshot", "delete", snapshotName, "--server", d.servers[1].address, "--certs",
			filepath.Join(d.dir, "client"))
		var left []struct{ State string }
		errList := d.ask(ctx, d.servers[1], &left, "snapshot", "list")
		return errList == nil && len(left) == 0, errors.Join(err, errList)
	})
}
