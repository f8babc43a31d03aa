package driver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/driver"
)

// buffer is a log that many calls may write at once.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// loud logs everything that there is to log.
func loud(w *buffer) func(*harness, *driver.Config) {
	return func(_ *harness, c *driver.Config) {
		c.Logger = slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug, AddSource: true}))
	}
}

// plant sets every secret map and secret string in m, and the value of a mount flag, to a canary,
// and fills the plain fields so that the call gets as far as it can. It returns what it planted.
func plant(m protoreflect.Message, plain map[string]string) (canaries []string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		canary := strings.ReplaceAll(trivet.NewUUID(), "-", "")
		secret, _ := proto.GetExtension(f.Options(), csi.E_CsiSecret).(bool)
		switch {
		case secret && f.IsMap():
			v := m.Mutable(f).Map()
			v.Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString(canary))
			canaries = append(canaries, canary)
		case secret && f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString(canary))
			canaries = append(canaries, canary)
		case f.Name() == "mount_flags":
			m.Mutable(f).List().Append(protoreflect.ValueOfString("password=" + canary))
			canaries = append(canaries, canary)
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			canaries = append(canaries, plant(m.Mutable(f).List().AppendMutable().Message(), plain)...)
		case !f.IsMap() && !f.IsList() && f.Kind() == protoreflect.StringKind && plain[string(f.Name())] != "":
			m.Set(f, protoreflect.ValueOfString(plain[string(f.Name())]))
		case f.Name() == "volume_capability" || f.Name() == "mount":
			canaries = append(canaries, plant(m.Mutable(f).Message(), plain)...)
		case f.Name() == "access_mode":
			mode := m.Mutable(f).Message()
			mode.Set(mode.Descriptor().Fields().ByName("mode"), protoreflect.ValueOfEnum(7))
		}
	}
	return canaries
}

// callAll sends a planted request to every method of the three services and returns the canaries
// and the names of the requests that held any.
func callAll(t *testing.T, h *harness, plain map[string]string) (canaries []string, holders map[string]bool) {
	t.Helper()
	holders = make(map[string]bool)
	for _, name := range []protoreflect.FullName{"csi.v1.Identity", "csi.v1.Controller", "csi.v1.Node"} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		require.NoError(t, err)
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			method := methods.Get(i)
			req := dynamicpb.NewMessage(method.Input())
			planted := plant(req, plain)
			canaries = append(canaries, planted...)
			if len(planted) > 0 {
				holders[string(method.Name())] = true
			}
			path := fmt.Sprintf("/%s/%s", name, method.Name())
			err := h.conn.Invoke(t.Context(), path, req, dynamicpb.NewMessage(method.Output()))
			for _, c := range planted {
				assert.NotContains(t, status.Convert(err).Message(), c, path)
			}
		}
	}
	return canaries, holders
}

// TestNoSecretIsLogged (S11): canaries in every secret field of every request, through success,
// failure and panic, at the most talkative level.
func TestNoSecretIsLogged(t *testing.T) {
	t.Parallel()
	for _, outcome := range []string{"success", "failure", "panic", "too large"} {
		t.Run(outcome, func(t *testing.T) {
			t.Parallel()
			log := &buffer{}
			h := open(t, loud(log))
			handle := h.mustCreate(t, "a")
			plain := map[string]string{
				"name": "a", "volume_id": handle, "node_id": string(thisNode), "fs_type": "ext4",
				"staging_target_path": h.dir + "/staging", "target_path": h.dir + "/target", "volume_path": h.dir,
			}
			h.breakAll(outcome)
			if outcome == "too large" {
				plain["name"], plain["volume_id"] = strings.Repeat("n", 129), strings.Repeat("v", 129)
			}
			canaries, holders := callAll(t, h, plain)
			for _, m := range []string{"CreateVolume", "ControllerPublishVolume", "NodeStageVolume", "NodePublishVolume"} {
				require.True(t, holders[m], "no canary in %s: the test sees nothing", m)
			}
			got := log.String()
			for _, c := range canaries {
				require.NotContains(t, got, c)
			}
			require.Contains(t, got, "/csi.v1.Node/NodeStageVolume")
			require.Contains(t, got, "password=***stripped***")
			require.Contains(t, got, `\"secrets\":\"***stripped***\"`)
			require.Equal(t, outcome == "panic", strings.Contains(got, "panic in csi call"))
			require.Equal(t, outcome == "success", strings.Contains(got, `\"publish_context\":{\"epoch\"`))
		})
	}
}

// breakAll makes every method of both fakes end as the outcome says, repeating its argument, as a
// careless error below the driver would.
func (h *harness) breakAll(outcome string) {
	for _, m := range []string{
		"CreateVolume", "DeleteVolume", "Volume", "Volumes", "Attach", "Detach", "Capacity",
		"Stage", "Unstage", "Publish", "Unpublish", "Stats",
	} {
		fail := func(_ context.Context, arg any) error {
			text := fmt.Sprintf("%s of %+q and %+v", m, arg, arg)
			switch outcome {
			case "failure":
				return errors.New(text)
			case "panic":
				panic(text)
			}
			if m == "DeleteVolume" {
				return trivet.ErrNotFound // which is success, and the volume is there for the other calls
			}
			return nil
		}
		h.ctrl.on(m, fail)
		h.node.on(m, fail)
	}
}

// TestPanic: the orchestrator hears INTERNAL and nothing of what happened; the driver lives on and
// the volume is not left claimed.
func TestPanic(t *testing.T) {
	t.Parallel()
	log := &buffer{}
	h := open(t, loud(log))
	handle := h.mustCreate(t, "a")
	h.ctrl.on("Attach", func(context.Context, any) error { panic("the invariant is broken") })
	_, err := h.ControllerPublishVolume(t.Context(), publishReq(handle))
	requireCode(t, codes.Internal, err)
	assert.NotContains(t, err.Error(), "invariant")
	assert.Contains(t, log.String(), "the invariant is broken")
	assert.Contains(t, log.String(), "goroutine")
	h.ctrl.on("Attach", nil)
	h.mustAttach(t, handle)
}

// TestLogLevels: an operator is told of what an operator must mend.
func TestLogLevels(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		trivet.ErrCorrupt:     "ERROR",
		errors.New("a bug"):   "ERROR",
		trivet.ErrUnavailable: "WARN",
		trivet.ErrNoSpace:     "WARN",
		trivet.ErrInUse:       "INFO",
	} {
		log := &buffer{}
		h := open(t, loud(log))
		h.ctrl.fail("CreateVolume", err)
		_, callErr := h.CreateVolume(t.Context(), createReq("a"))
		require.Error(t, callErr)
		assert.Regexp(t, `"level":"`+want+`"[^\n]*"msg":"csi call failed"[^\n]*"err":"`+err.Error(), log.String())
	}
}
