package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/trivet-csi/trivet"
)

// errorTextBytesMax bounds the text of an error on the wire; longer ones are cut.
const errorTextBytesMax = 4 << 10

// wireSentinels are the errors that keep their identity across the wire. The position in the
// list is the bit in the code mask, hence part of the wire format: append only.
var wireSentinels = [...]error{
	trivet.ErrNotFound,
	trivet.ErrExists,
	trivet.ErrInUse,
	trivet.ErrFenced,
	trivet.ErrNotLeader,
	trivet.ErrUnavailable,
	trivet.ErrPending,
	trivet.ErrNoSpace,
	trivet.ErrOutOfRange,
	trivet.ErrCorrupt,
	trivet.ErrClosed,
	trivet.ErrInvalid,
	context.DeadlineExceeded,
	context.Canceled,
}

// RemoteError is what a handler on another node returned. errors.Is finds the sentinels that the
// original matched; other types in its chain do not cross the wire.
type RemoteError struct {
	Node trivet.NodeID // where the handler ran
	Text string        // what the original's Error returned, at most 4 KiB

	codes uint32
}

// Error returns the text of the original and the node it came from.
func (e *RemoteError) Error() string { return fmt.Sprintf("node %s: %s", e.Node, e.Text) }

// Unwrap returns the sentinels that the original matched. Bits of a newer version are ignored.
func (e *RemoteError) Unwrap() []error {
	var errs []error
	for i, s := range wireSentinels {
		if e.codes&(1<<i) != 0 {
			errs = append(errs, s)
		}
	}
	return errs
}

// encodeError returns the body of an error frame:
//
//	 0           4
//	+-----------+----------------------+
//	| codes u32 | text, UTF-8, to end  |   big endian; bit i of codes = wireSentinels[i]
//	+-----------+----------------------+
//
// REQUIRES: err != nil.
func encodeError(err error) []byte { return EncodeError(err, errorTextBytesMax) }

// EncodeError returns an error in the form in which it crosses the wire, with at most so many bytes of
// text, for those who send several answers in one message. REQUIRES: err != nil.
func EncodeError(err error, textBytesMax int) []byte {
	var codes uint32
	for i, s := range wireSentinels {
		if errors.Is(err, s) {
			codes |= 1 << i
		}
	}
	text := cutText(strings.ToValidUTF8(err.Error(), "\uFFFD"), min(textBytesMax, errorTextBytesMax))
	return append(binary.BigEndian.AppendUint32(nil, codes), text...)
}

// decodeError is the inverse of encodeError, for an error that came from node. A body that is no
// error is ErrCorrupt.
func decodeError(node trivet.NodeID, body []byte) (*RemoteError, error) {
	if len(body) < 4 {
		return nil, fmt.Errorf("error frame of %d bytes, want at least 4: %w", len(body), trivet.ErrCorrupt)
	}
	text := cutText(strings.ToValidUTF8(string(body[4:]), "\uFFFD"), errorTextBytesMax)
	return &RemoteError{Node: node, Text: text, codes: binary.BigEndian.Uint32(body)}, nil
}

// DecodeError is the inverse of EncodeError, for an error that came from node: a RemoteError. A body
// that is no error is ErrCorrupt, in bad.
func DecodeError(node trivet.NodeID, body []byte) (remote, bad error) {
	e, err := decodeError(node, body)
	if err != nil {
		return nil, err
	}
	return e, nil
}

// cutText shortens s to bytesMax without splitting a character.
func cutText(s string, bytesMax int) string {
	if len(s) <= bytesMax {
		return s
	}
	end := bytesMax
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}
