package driver

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// InterceptStream is Intercept for calls whose answer is a stream.
func InterceptStream(log *slog.Logger) grpc.StreamServerInterceptor {
	log = orDiscard(log)
	calls := new(atomic.Uint64)
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		if !strings.HasPrefix(info.FullMethod, servicePrefix) {
			return next(srv, ss)
		}
		s := &checkedStream{
			ServerStream: ss, log: log.With(keyCall, fmt.Sprintf("s%d", calls.Add(1)), keyMethod, info.FullMethod),
		}
		return s.run(srv, next)
	}
}

// checkedStream is a stream whose request is checked and logged when it arrives.
type checkedStream struct {
	grpc.ServerStream

	log   *slog.Logger
	req   any // as received; nil before
	sentN int // messages
}

func (s *checkedStream) run(srv any, next grpc.StreamHandler) error {
	ctx, began := s.Context(), time.Now()
	err := s.call(ctx, srv, next)
	took := time.Since(began)
	if err == nil {
		s.log.DebugContext(ctx, "csi stream ended", "messages", s.sentN, keyTook, took)
		return nil
	}
	st := status.Convert(ToStatus(err))
	text := scrub(st.Message(), s.req)
	s.log.Log(ctx, levelOf(st.Code()), "csi call failed", keyCode, st.Code().String(), keyErr, text, keyTook, took)
	return status.Error(st.Code(), text)
}

func (s *checkedStream) call(ctx context.Context, srv any, next grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.ErrorContext(ctx, "panic in csi call", "panic", scrub(fmt.Sprint(p), s.req), "stack", string(debug.Stack()))
			err = errPanic
		}
	}()
	return next(srv, s)
}

// RecvMsg implements grpc.ServerStream.
func (s *checkedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	s.req = m
	s.log.DebugContext(s.Context(), "csi request", "request", loggable{m})
	if p, ok := m.(proto.Message); ok {
		return checkLimits(p)
	}
	return nil
}

// SendMsg implements grpc.ServerStream.
func (s *checkedStream) SendMsg(m any) error {
	if err := s.ServerStream.SendMsg(m); err != nil {
		return err
	}
	s.sentN++
	return nil
}
