package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// Cleanup removes what dead processes left under runDir, as Leftovers.Clean does.
func Cleanup(ctx context.Context, runDir string, log *slog.Logger) ([]string, error) {
	return Leftovers{RunDir: runDir, Logger: log}.Clean(ctx, nil)
}

// Leftovers is what dead processes left under RunDir. Attachments of live processes, this one included,
// are no part of it. A missing RunDir is an empty one. Use it before the first Attach.
type Leftovers struct {
	RunDir string
	Keeper *keeper.Client // nil = there is none
	Logger *slog.Logger   // nil discards
}

// Clean removes all but the attachments named in except: it unmounts, in this mount namespace, everything
// that stands on their block devices, removes the devices and deletes the records. Data that were not
// fsynced are lost. It returns the names of the attachments it removed, also beside an error; one
// that cannot be removed does not keep it from the others.
//
// It touches only what a record names, and a device only if the kernel says that it is ours.
func (l Leftovers) Clean(ctx context.Context, except []string) ([]string, error) {
	var cleaned []string
	err := l.each(ctx, func(dir *folder, s *site) error {
		if slices.Contains(except, s.name) {
			dir.unlock()
			return nil
		}
		if err := s.clean(ctx); err != nil {
			dir.unlock()
			return err
		}
		s.log.Info("removed an attachment that a dead process left")
		cleaned = append(cleaned, s.name)
		return dir.remove()
	})
	if err != nil {
		return cleaned, fmt.Errorf("clean up: %w", err)
	}
	return cleaned, nil
}

// CleanOne removes one attachment as Clean does. None of that name is success; ErrInUse: its process
// lives.
func (l Leftovers) CleanOne(ctx context.Context, name string) error {
	path, err := attachmentPath(l.RunDir, name)
	if err != nil {
		return fmt.Errorf("clean up %s: %w", name, err)
	}
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("clean up %s: %w", name, err)
	}
	if err := l.site(dir).clean(ctx); err != nil {
		dir.unlock()
		return fmt.Errorf("clean up %s: %w", name, err)
	}
	return dir.remove()
}

// Abort makes every request on the device of an attachment fail, so that nothing that looks at it waits
// for a server. What was dead before, or is not there, is success. ErrInUse: its process lives.
func (l Leftovers) Abort(ctx context.Context, name string) error {
	path, err := attachmentPath(l.RunDir, name)
	if err != nil {
		return fmt.Errorf("abort %s: %w", name, err)
	}
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("abort %s: %w", name, err)
	}
	defer dir.unlock()
	rec, err := dir.read()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("abort %s: %w", name, err)
	}
	if t, ok := transportOf(rec.Kind).(aborter); ok {
		if err := t.abort(ctx, l.site(dir), rec); err != nil {
			return fmt.Errorf("abort %s: %w", name, err)
		}
	}
	return nil
}

// Resumable returns the names of the attachments that Resume can go on with. It changes nothing. One
// that it cannot tell of, such as a record that makes no sense, is not among them.
func (l Leftovers) Resumable(ctx context.Context) ([]string, error) {
	var names []string
	err := l.each(ctx, func(dir *folder, s *site) error {
		defer dir.unlock()
		if _, _, err := s.resumable(ctx); err != nil {
			s.log.Warn("an attachment of the last process cannot be resumed", "err", err)
			return nil
		}
		names = append(names, s.name)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for attachments: %w", err)
	}
	return names, nil
}

// Check returns nil if Resume can go on with the attachment of that name. ErrClosed or ErrNotFound: nobody
// ever can; anything else may change.
func (l Leftovers) Check(ctx context.Context, name string) error {
	path, err := attachmentPath(l.RunDir, name)
	if err != nil {
		return fmt.Errorf("check %s: %w", name, err)
	}
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("check %s: %w", name, trivet.ErrNotFound)
	} else if err != nil {
		return fmt.Errorf("check %s: %w", name, err)
	}
	defer dir.unlock()
	if _, _, err := l.site(dir).resumable(ctx); err != nil {
		return fmt.Errorf("check %s: %w", name, err)
	}
	return nil
}

// each calls do with the folder, locked, of each attachment of a dead process. do unlocks it.
func (l Leftovers) each(ctx context.Context, do func(*folder, *site) error) error {
	runDir, err := filepath.EvalSymlinks(l.RunDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		if !e.IsDir() {
			continue
		}
		dir, err := lockFolder(filepath.Join(runDir, e.Name()), false)
		switch {
		case errors.Is(err, os.ErrNotExist): // no lock: not a folder of ours
			continue
		case errors.Is(err, errAlive):
			continue
		case err == nil:
			err = do(dir, l.site(dir))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Name(), err))
		}
	}
	return errors.Join(errs...)
}

func (l Leftovers) site(dir *folder) *site {
	return newSite(Config{Name: dir.name(), Keeper: l.Keeper, Logger: l.Logger}, dir)
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
