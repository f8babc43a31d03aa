package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/trivet-csi/trivet"
)

// Cleanup removes what dead processes left under runDir: it unmounts, in this mount namespace,
// everything that stands on their block devices, removes the devices and deletes the records. Data that were not fsynced are lost; they were already when the
// process died. It returns the names of the attachments it removed, also beside an error; one
// that cannot be removed does not keep it from the others.
//
// It touches only what a record names, and a device only if the kernel says that it is ours. Attachments of live processes, this one included, are left alone. A missing
// runDir is an empty one. Call it before the first Attach.
func Cleanup(ctx context.Context, runDir string, log *slog.Logger) ([]string, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("component", "blockdev")
	runDir, err := filepath.EvalSymlinks(runDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("clean up: %w", err)
	}
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return nil, fmt.Errorf("clean up: %w", err)
	}
	var cleaned []string
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			errs = append(errs, fmt.Errorf("clean up: %w", context.Cause(ctx)))
			break
		}
		if !e.IsDir() {
			continue
		}
		done, err := cleanOne(ctx, filepath.Join(runDir, e.Name()), log.With("volume", e.Name()))
		if err != nil {
			errs = append(errs, fmt.Errorf("clean up %s: %w", e.Name(), err))
		} else if done {
			cleaned = append(cleaned, e.Name())
		}
	}
	return cleaned, errors.Join(errs...)
}

// cleanOne removes one attachment, and tells whether there was one to remove.
func cleanOne(ctx context.Context, path string, log *slog.Logger) (bool, error) {
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) { // no lock: not a folder of ours
		return false, nil
	}
	if errors.Is(err, errAlive) {
		log.Info("attachment left alone: its process is alive")
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := (&site{name: filepath.Base(path), folder: dir, log: log}).clean(ctx); err != nil {
		dir.unlock()
		return false, err
	}
	log.Info("removed an attachment that a dead process left")
	return true, dir.remove()
}

// clean undoes what the record in the folder says, if there is one. The files stay.
func (s *site) clean(ctx context.Context) error {
	rec, err := s.folder.read()
	if errors.Is(err, os.ErrNotExist) { // nothing is done before there is a record
		return nil
	}
	if err != nil {
		return err
	}
	t := transportOf(rec.Kind)
	if t == nil {
		return fmt.Errorf("kernel device by %s: not in this build: %w", rec.Kind, trivet.ErrUnavailable)
	}
	return t.clean(ctx, s, rec)
}
