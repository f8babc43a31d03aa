package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Keys of log attributes.
const (
	keyCall   = "call" // number of the call since the start, to find answer and request together
	keyMethod = "method"
	keyCode   = "code"
	keyTook   = "took"
	keyErr    = "err"
)

const (
	stripped = "***stripped***" // the word that protosanitizer uses

	// scrubMin is the length in bytes of the shortest text that is removed from messages: shorter
	// ones would mutilate every message and are no secret.
	scrubMin = 4
)

// errPanic is what the orchestrator hears of a panic; the log has the rest.
var errPanic = errors.New("internal error: see the log of the driver")

// servicePrefix begins the full method names of every CSI service.
const servicePrefix = "/csi.v1."

// Intercept returns what must stand around every CSI call of a gRPC server: it checks size limits,
// turns panics and errors into statuses and logs request, answer and failure without anything
// secret. Calls of other services pass it untouched. A nil logger discards.
func Intercept(log *slog.Logger) grpc.UnaryServerInterceptor {
	log = orDiscard(log)
	calls := new(atomic.Uint64)
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if !strings.HasPrefix(info.FullMethod, servicePrefix) {
			return next(ctx, req)
		}
		return intercept(ctx, log.With(keyCall, calls.Add(1), keyMethod, info.FullMethod), req, next)
	}
}

func intercept(ctx context.Context, log *slog.Logger, req any, next grpc.UnaryHandler) (any, error) {
	log.DebugContext(ctx, "csi request", "request", loggable{req})
	began := time.Now()
	resp, err := call(ctx, log, req, next)
	took := time.Since(began)
	if err == nil {
		log.DebugContext(ctx, "csi answer", "answer", loggable{resp}, keyTook, took)
		return resp, nil
	}
	st := status.Convert(ToStatus(err))
	text := scrub(st.Message(), req)
	log.Log(ctx, levelOf(st.Code()), "csi call failed", keyCode, st.Code().String(), keyErr, text, keyTook, took)
	return nil, status.Error(st.Code(), text)
}

func call(ctx context.Context, log *slog.Logger, req any, next grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			log.ErrorContext(ctx, "panic in csi call", "panic", scrub(fmt.Sprint(p), req), "stack", string(debug.Stack()))
			resp, err = nil, errPanic
		}
	}()
	if m, ok := req.(proto.Message); ok {
		if err := checkLimits(m); err != nil {
			return nil, err
		}
	}
	return next(ctx, req)
}

// levelOf says who must know of a failure: an operator of what is broken here; of the rest, which
// the orchestrator reports to whom it concerns and mostly tries again, only who asks for it.
func levelOf(c codes.Code) slog.Level {
	switch c {
	case codes.Internal, codes.DataLoss, codes.Unknown:
		return slog.LevelError
	case codes.Unavailable, codes.ResourceExhausted:
		return slog.LevelWarn
	default:
		return slog.LevelInfo
	}
}

// loggable prints a message without its secrets and without the values of mount flags. It costs
// nothing unless it is printed.
type loggable struct{ msg any }

// LogValue implements slog.LogValuer.
func (l loggable) LogValue() slog.Value {
	m, ok := l.msg.(proto.Message)
	if !ok {
		return slog.StringValue(fmt.Sprintf("%T", l.msg))
	}
	m = proto.Clone(m)
	stripMountFlags(m.ProtoReflect())
	return slog.StringValue(protosanitizer.StripSecrets(m).String())
}

// stripMountFlags keeps the names of mount flags and hides their values.
func stripMountFlags(m protoreflect.Message) {
	walk(m, func(f protoreflect.FieldDescriptor, v protoreflect.Value) {
		if f.Name() != fieldMountFlags || !f.IsList() {
			return
		}
		for i := range v.List().Len() {
			if name, _, ok := strings.Cut(v.List().Get(i).String(), "="); ok {
				v.List().Set(i, protoreflect.ValueOfString(name+"="+stripped))
			}
		}
	})
}

// walk calls visit for every field that is set in m and in the messages within.
func walk(m protoreflect.Message, visit func(protoreflect.FieldDescriptor, protoreflect.Value)) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		visit(f, v)
		switch {
		case f.IsMap() || f.Kind() != protoreflect.MessageKind:
		case f.IsList():
			for i := range v.List().Len() {
				walk(v.List().Get(i).Message(), visit)
			}
		default:
			walk(v.Message(), visit)
		}
		return true
	})
}

// scrub removes from text every secret of the request and every value of a mount flag. Nothing
// below the driver is given a secret today; this holds should an error ever quote one.
func scrub(text string, req any) string {
	m, ok := req.(proto.Message)
	if !ok {
		return text
	}
	var hidden []string
	walk(m.ProtoReflect(), func(f protoreflect.FieldDescriptor, v protoreflect.Value) {
		hidden = append(hidden, secretsOf(f, v)...)
	})
	// The longest first: a short one may be a part of it.
	slices.SortFunc(hidden, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	for _, h := range hidden {
		text = strings.ReplaceAll(text, h, stripped)
		quoted := strconv.Quote(h) // as %q prints it
		text = strings.ReplaceAll(text, quoted[1:len(quoted)-1], stripped)
	}
	return text
}

// secretsOf returns what must not be printed of one field.
func secretsOf(f protoreflect.FieldDescriptor, v protoreflect.Value) []string {
	var out []string
	add := func(s string) {
		if len(s) >= scrubMin {
			out = append(out, s)
		}
	}
	secret, _ := proto.GetExtension(f.Options(), csi.E_CsiSecret).(bool)
	switch {
	case secret && f.IsMap():
		v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
			add(v.String())
			return true
		})
	case secret && f.Kind() == protoreflect.StringKind && !f.IsList():
		add(v.String())
	case f.Name() == fieldMountFlags && f.IsList():
		for i := range v.List().Len() {
			_, value, _ := strings.Cut(v.List().Get(i).String(), "=")
			add(value)
		}
	}
	return out
}
