package driver

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/trivet-csi/trivet"
)

// Limits of the specification ("Size Limits"), in bytes.
const (
	stringMax = 128
	nodeIDMax = 256
	mapMax    = 4096 // keys and values of one map together; also all mount flags together
	pathMax   = 4096 // PATH_MAX of Linux; the specification sets no upper bound
)

// Fields whose limits differ from those of their type, by protobuf name.
const (
	fieldNodeID     = "node_id"
	fieldToken      = "starting_token" // an overlong one is a bad one, which is ABORTED
	fieldMountFlags = "mount_flags"
	suffixPath      = "_path"
)

// checkLimits returns ErrInvalid naming the first field of m, or of a message in it, that is
// larger than the specification allows. Values are not repeated: they may be secret.
func checkLimits(m proto.Message) error { return checkMessage(m.ProtoReflect()) }

func checkMessage(m protoreflect.Message) (err error) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		err = checkField(f, v)
		return err == nil
	})
	return err
}

func checkField(f protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch {
	case f.IsMap():
		size := 0
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			size += len(k.String()) + len(v.String())
			return true
		})
		return checkSize(f, size, mapMax)
	case f.IsList():
		return checkList(f, v.List())
	case f.Kind() == protoreflect.MessageKind:
		return checkMessage(v.Message())
	case f.Kind() == protoreflect.StringKind:
		return checkSize(f, len(v.String()), limitOf(string(f.Name())))
	default:
		return nil
	}
}

func checkList(f protoreflect.FieldDescriptor, l protoreflect.List) error {
	size := 0
	for i := range l.Len() {
		switch {
		case f.Kind() == protoreflect.MessageKind:
			if err := checkMessage(l.Get(i).Message()); err != nil {
				return err
			}
		case f.Kind() == protoreflect.StringKind && f.Name() == fieldMountFlags:
			size += len(l.Get(i).String())
		case f.Kind() == protoreflect.StringKind: // such as the volumes of a group: each has its limit, their number none
			if err := checkSize(f, len(l.Get(i).String()), limitOf(string(f.Name()))); err != nil {
				return err
			}
		}
	}
	return checkSize(f, size, mapMax)
}

func limitOf(field string) int {
	switch {
	case strings.HasSuffix(field, suffixPath), field == fieldToken:
		return pathMax
	case field == fieldNodeID:
		return nodeIDMax
	default:
		return stringMax
	}
}

func checkSize(f protoreflect.FieldDescriptor, size, limit int) error {
	if size > limit {
		return fmt.Errorf("%s has %d bytes, at most %d are allowed: %w", f.Name(), size, limit, trivet.ErrInvalid)
	}
	return nil
}

// checkVolumeID returns ErrInvalid unless s could be somebody's volume handle: not empty and
// without characters that would be dangerous in a path or a log (S7). Whether it is one of ours
// parseVolume tells, once the rest of the request is known to be well formed.
func checkVolumeID(s string) error { return checkHandle("volume_id", s) }

// checkHandle is checkVolumeID for a handle of anything, in the field of that name.
func checkHandle(field, s string) error {
	if s == "" {
		return fmt.Errorf("%s is missing: %w", field, trivet.ErrInvalid)
	}
	if err := trivet.ValidateName(s); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}

// parseVolume returns the volume that a handle names. A handle that Trivet never gave out names no
// volume: ErrNotFound.
func parseVolume(s string) (trivet.VolumeID, error) {
	id, err := trivet.ParseVolumeID(s)
	if err != nil {
		return 0, fmt.Errorf("volume %q is none of ours: %w", s, trivet.ErrNotFound)
	}
	return id, nil
}

// checkPath returns p cleaned, or ErrInvalid unless it is an absolute path other than the root and
// without "..". That nothing on the way is a link is for the Node to see when it opens it (S8).
func checkPath(field, p string) (string, error) {
	switch {
	case p == "":
		return "", fmt.Errorf("%s is missing: %w", field, trivet.ErrInvalid)
	case !filepath.IsAbs(p), strings.ContainsRune(p, 0), slices.Contains(strings.Split(p, "/"), ".."):
		return "", fmt.Errorf("%s %q: want an absolute path without \"..\": %w", field, p, trivet.ErrInvalid)
	case filepath.Clean(p) == "/":
		return "", fmt.Errorf("%s is the root directory: %w", field, trivet.ErrInvalid)
	}
	return filepath.Clean(p), nil
}
