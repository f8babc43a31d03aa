package driver_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/node"
)

func TestIdentity(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	info, err := h.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	require.NoError(t, err)
	assert.Equal(t, "csi.trivet.dev", info.GetName())
	assert.Equal(t, "1.2.3", info.GetVendorVersion())

	caps, err := h.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	require.NoError(t, err)
	got := make([]string, 0, len(caps.GetCapabilities()))
	for _, c := range caps.GetCapabilities() {
		if v := c.GetVolumeExpansion(); v != nil {
			got = append(got, v.GetType().String())
			continue
		}
		got = append(got, c.GetService().GetType().String())
	}
	assert.Equal(t, []string{
		"CONTROLLER_SERVICE", "VOLUME_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_METADATA_SERVICE",
		"GROUP_CONTROLLER_SERVICE", "ONLINE",
	}, got)

	for _, ready := range []bool{false, true} {
		h.ready = ready
		probe, err := h.Probe(t.Context(), &csi.ProbeRequest{})
		require.NoError(t, err)
		require.NotNil(t, probe.GetReady(), "absent means ready")
		assert.Equal(t, ready, probe.GetReady().GetValue())
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	cc, err := h.ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
	require.NoError(t, err)
	ctrl := make([]int32, 0, len(cc.GetCapabilities()))
	for _, c := range cc.GetCapabilities() {
		ctrl = append(ctrl, int32(c.GetRpc().GetType()))
	}
	assert.Equal(t, []int32{1, 2, 3, 4, 8, 10, 12, 13, 14, 16, 17, 5, 6, 15, 7, 9}, ctrl)
	nc, err := h.NodeGetCapabilities(t.Context(), &csi.NodeGetCapabilitiesRequest{})
	require.NoError(t, err)
	nodes := make([]int32, 0, len(nc.GetCapabilities()))
	for _, c := range nc.GetCapabilities() {
		nodes = append(nodes, int32(c.GetRpc().GetType()))
	}
	assert.Equal(t, []int32{1, 2, 5, 7, 8, 3}, nodes)
}

func TestNodeInfo(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		info node.Info
		want map[string]string
	}{
		{node.Info{Node: "n", Zone: "z"}, map[string]string{controller.TopologyNode: "n", controller.TopologyZone: "z"}},
		{node.Info{Node: "n", MaxVolumes: 7}, map[string]string{controller.TopologyNode: "n"}},
	} {
		h := open(t, func(h *harness, _ *driver.Config) { h.node.info = tt.info })
		got, err := h.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
		require.NoError(t, err)
		assert.Equal(t, "n", got.GetNodeId())
		assert.Equal(t, tt.info.MaxVolumes, got.GetMaxVolumesPerNode())
		assert.Equal(t, tt.want, got.GetAccessibleTopology().GetSegments())
	}
}

// TestCreateRequest: what the controller is told, and what the orchestrator hears.
func TestCreateRequest(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	var got controller.CreateRequest
	h.ctrl.on("CreateVolume", func(_ context.Context, r any) error {
		got = r.(controller.CreateRequest)
		return nil
	})
	req := createReq("pvc-1")
	req.CapacityRange.LimitBytes = 1 << 30
	req.AccessibilityRequirements = &csi.TopologyRequirement{
		Requisite: []*csi.Topology{
			{Segments: map[string]string{"Topology.CSI.trivet.dev/Node": "node-a", controller.TopologyZone: "z1"}},
			{},
			{Segments: map[string]string{controller.TopologyZone: "z2"}},
		},
		Preferred: topologies(controller.TopologyZone, "z2"),
	}
	resp, err := h.CreateVolume(t.Context(), req)
	require.NoError(t, err)
	assert.Equal(t, controller.CreateRequest{
		Name:          "pvc-1",
		RequiredBytes: 64 << 20,
		LimitBytes:    1 << 30,
		Params:        map[string]string{"replicas": "3"},
		Requisite: []map[string]string{
			{controller.TopologyNode: "node-a", controller.TopologyZone: "z1"},
			{controller.TopologyZone: "z2"},
		},
		Preferred: []map[string]string{{controller.TopologyZone: "z2"}},
	}, got)
	v := resp.GetVolume()
	assert.Equal(t, int64(64<<20), v.GetCapacityBytes())
	assert.Empty(t, v.GetAccessibleTopology(), "reachable from every node, those of tomorrow included")
	assert.Empty(t, v.GetVolumeContext())
	_, err = trivet.ParseVolumeID(v.GetVolumeId())
	require.NoError(t, err)
}

// TestCreateNotDone: a volume whose replicas are not ready is not handed out.
func TestCreateNotDone(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	v := h.ctrl.put(meta.Volume{
		Name: "a", SizeBytes: 64 << 20, Phase: meta.PhaseCreating, Request: controller.DefaultParams().Fingerprint(),
	})
	_, err := h.CreateVolume(t.Context(), createReq("a"))
	requireCode(t, codes.Aborted, err)
	require.ErrorContains(t, err, v.ID.String())
}

// TestOneAtATime: of many calls on one volume one works and the others are ABORTED at once; calls
// on other volumes are not held up.
func TestOneAtATime(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	entered, leave := make(chan struct{}, 1), make(chan struct{})
	hold := func(_ context.Context, arg any) error {
		if r, ok := arg.(controller.CreateRequest); ok && r.Name != "same" {
			return nil
		}
		entered <- struct{}{}
		<-leave
		return nil
	}
	other := h.mustCreate(t, "other")
	h.ctrl.on("CreateVolume", hold)
	h.ctrl.on("Detach", hold)
	h.node.on("Stage", hold)
	for name, call := range map[string]func() error{
		"CreateVolume": func() error { _, err := h.CreateVolume(t.Context(), createReq("same")); return err },
		"ControllerUnpublishVolume": func() error {
			_, err := h.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: other})
			return err
		},
		"NodeStageVolume": func() error { _, err := h.NodeStageVolume(t.Context(), h.stageReq(other)); return err },
	} {
		first := make(chan error, 1)
		go func() { first <- call() }()
		<-entered
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { assert.Equal(t, codes.Aborted, status.Code(call()), name) })
		}
		wg.Wait()
		h.mustCreate(t, "free-"+name)
		leave <- struct{}{}
		require.NoError(t, <-first, name)
	}
}

// TestDeadline: a caller that stops waiting hears so; the call it left goes on to its end, and the
// volume stays claimed until then.
func TestDeadline(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	entered, leave := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h.ctrl.on("CreateVolume", func(context.Context, any) error {
		once.Do(func() {
			close(entered)
			<-leave
		})
		return nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { _, err := h.CreateVolume(ctx, createReq("a")); first <- err }()
	<-entered
	cancel()
	requireCode(t, codes.Canceled, <-first)
	_, err := h.CreateVolume(t.Context(), createReq("a"))
	requireCode(t, codes.Aborted, err)
	close(leave)
	require.Eventually(t, func() bool {
		_, err = h.CreateVolume(t.Context(), createReq("a"))
		return err == nil
	}, waitMax, pollEvery)
	volumes, err := h.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	require.NoError(t, err)
	require.Len(t, volumes.GetEntries(), 1, "the retry found the volume of the first call")
}

func TestPublishContext(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		mode     csi.VolumeCapability_AccessMode_Mode
		readOnly bool
		want     attachArgs
		context  map[string]string
	}{
		{"rwo", snmw, false, attachArgs{mode: meta.SingleNodeMultiWriter}, map[string]string{"epoch": "1"}},
		{"rwop", snsw, false, attachArgs{mode: meta.SingleNodeSingleWriter}, map[string]string{"epoch": "1"}},
		{"old", snw, false, attachArgs{mode: meta.SingleNodeSingleWriter}, map[string]string{"epoch": "1"}},
		{
			"read-only", snmw, true,
			attachArgs{mode: meta.SingleNodeMultiWriter, readOnly: true},
			map[string]string{"epoch": "1", "readOnly": "true"},
		},
		{
			"reader", snro, false,
			attachArgs{mode: meta.SingleNodeReader, readOnly: true},
			map[string]string{"epoch": "1", "readOnly": "true"},
		},
		{
			"readers", csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY, false,
			attachArgs{mode: meta.MultiNodeReader, readOnly: true},
			map[string]string{"epoch": "1", "readOnly": "true"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := open(t, nil)
			handle := h.mustCreate(t, "a")
			var got attachArgs
			h.ctrl.on("Attach", func(_ context.Context, a any) error { got = a.(attachArgs); return nil })
			req := publishReq(handle)
			req.VolumeCapability, req.Readonly = mountCap(tt.mode), tt.readOnly
			for range 2 { // the same again gives the same
				resp, err := h.ControllerPublishVolume(t.Context(), req)
				require.NoError(t, err)
				assert.Equal(t, tt.context, resp.GetPublishContext())
			}
			tt.want.volume, tt.want.node = got.volume, thisNode
			assert.Equal(t, tt.want, got)
			_, err := h.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: handle})
			require.NoError(t, err)
			assert.Nil(t, h.attachment(t, handle), "an empty node_id detaches from all")
			resp, err := h.ControllerPublishVolume(t.Context(), req)
			require.NoError(t, err)
			assert.Equal(t, "3", resp.GetPublishContext()["epoch"], "the detach raised it too")
		})
	}
}

// TestPublishNotFenced: OK must not be answered before older attachments are fenced.
func TestPublishNotFenced(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	v := h.ctrl.put(meta.Volume{
		Phase: meta.PhaseBound, Epoch: 5, FencedEpoch: 4,
		Attached: &meta.Attachment{Node: thisNode, Mode: meta.SingleNodeMultiWriter, Epoch: 5},
	})
	_, err := h.ControllerPublishVolume(t.Context(), publishReq(v.ID.String()))
	requireCode(t, codes.Unavailable, err)
}

// TestReadOnlyReachesTheNode: every way of asking for read-only ends in a read-only request.
func TestReadOnlyReachesTheNode(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name           string
		mode           csi.VolumeCapability_AccessMode_Mode
		context        string
		readOnly       bool
		stage, publish bool
	}{
		{"read-write", snmw, "", false, false, false},
		{"said to be false", snmw, "false", false, false, false},
		{"attached read-only", snmw, "true", false, true, true},
		{"reader", snro, "", false, true, true},
		{"published read-only", snmw, "", true, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := open(t, nil)
			handle := h.mustCreate(t, "a")
			var staged node.StageRequest
			var published node.PublishRequest
			h.node.on("Stage", func(_ context.Context, r any) error { staged = r.(node.StageRequest); return nil })
			h.node.on("Publish", func(_ context.Context, r any) error { published = r.(node.PublishRequest); return nil })
			s, p := h.stageReq(handle), h.nodePublishReq(handle, "target")
			s.VolumeCapability, p.VolumeCapability, p.Readonly = mountCap(tt.mode), mountCap(tt.mode), tt.readOnly
			if tt.context != "" {
				s.PublishContext["readOnly"], p.PublishContext["readOnly"] = tt.context, tt.context
			}
			_, err := h.NodeStageVolume(t.Context(), s)
			require.NoError(t, err)
			_, err = h.NodePublishVolume(t.Context(), p)
			require.NoError(t, err)
			assert.Equal(t, tt.stage, staged.ReadOnly)
			assert.Equal(t, tt.publish, published.ReadOnly)
		})
	}
}

func TestNodeRequests(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	id, err := trivet.ParseVolumeID(handle)
	require.NoError(t, err)
	var staged, published any
	h.node.on("Stage", func(_ context.Context, r any) error { staged = r; return nil })
	h.node.on("Publish", func(_ context.Context, r any) error { published = r; return nil })
	s, p := h.stageReq(handle), h.nodePublishReq(handle, "t//target/")
	s.VolumeCapability.GetMount().MountFlags = []string{"noatime"}
	p.VolumeCapability = s.GetVolumeCapability()
	_, err = h.NodeStageVolume(t.Context(), s)
	require.NoError(t, err)
	assert.Equal(t, node.StageRequest{
		Volume: id, StagingPath: h.dir + "/staging", FSType: "ext4", MountFlags: []string{"noatime"},
	}, staged)
	_, err = h.NodePublishVolume(t.Context(), p)
	require.Error(t, err, "the fake makes one level of directories")
	assert.Equal(t, node.PublishRequest{
		Volume: id, StagingPath: h.dir + "/staging", TargetPath: h.dir + "/t/target", FSType: "ext4",
		MountFlags: []string{"noatime"}, Mode: meta.SingleNodeMultiWriter,
	}, published)
}

func TestStats(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	_, err := h.NodeStageVolume(t.Context(), h.stageReq(handle))
	require.NoError(t, err)
	req := &csi.NodeGetVolumeStatsRequest{VolumeId: handle, VolumePath: h.dir + "/staging"}
	resp, err := h.NodeGetVolumeStats(t.Context(), req)
	require.NoError(t, err)
	require.Len(t, resp.GetUsage(), 2)
	b, i := resp.GetUsage()[0], resp.GetUsage()[1]
	assert.Equal(t, []int64{64 << 20, 1 << 20, 62 << 20}, []int64{b.GetTotal(), b.GetUsed(), b.GetAvailable()})
	assert.Equal(t, csi.VolumeUsage_BYTES, b.GetUnit())
	assert.Equal(t, []int64{1000, 11, 989}, []int64{i.GetTotal(), i.GetUsed(), i.GetAvailable()})
	assert.Equal(t, csi.VolumeUsage_INODES, i.GetUnit())

	block := h.stageReq(handle)
	block.VolumeCapability = blockCap(snmw)
	_, err = h.NodeStageVolume(t.Context(), block)
	require.NoError(t, err)
	resp, err = h.NodeGetVolumeStats(t.Context(), req)
	require.NoError(t, err)
	require.Len(t, resp.GetUsage(), 1)
	assert.Equal(t, int64(64<<20), resp.GetUsage()[0].GetTotal())
}

func TestValidateVolumeCapabilities(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	handle := h.mustCreate(t, "a")
	ask := func(caps ...*csi.VolumeCapability) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		return h.ValidateVolumeCapabilities(t.Context(),
			&csi.ValidateVolumeCapabilitiesRequest{VolumeId: handle, VolumeCapabilities: caps})
	}
	resp, err := ask(mountCap(snw), blockCap(snsw), mountCap(snmw), mountCap(snro), blockCap(mnmw))
	require.NoError(t, err)
	assert.Len(t, resp.GetConfirmed().GetVolumeCapabilities(), 5)
	assert.Empty(t, resp.GetMessage())

	resp, err = ask(mountCap(snw), mountCap(mnmw))
	require.NoError(t, err, "not confirmed is an answer")
	assert.Nil(t, resp.GetConfirmed())
	assert.Contains(t, resp.GetMessage(), "MULTI_NODE_MULTI_WRITER")

	_, err = ask()
	requireCode(t, codes.InvalidArgument, err)
	_, err = ask(blockCap(mnmw), &csi.VolumeCapability{})
	requireCode(t, codes.InvalidArgument, err)
}

func TestGetCapacity(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	var got [2]map[string]string
	h.ctrl.on("Capacity", func(_ context.Context, a any) error { got = a.([2]map[string]string); return nil })
	resp, err := h.GetCapacity(t.Context(), &csi.GetCapacityRequest{
		Parameters:         map[string]string{"replicas": "3"},
		VolumeCapabilities: []*csi.VolumeCapability{mountCap(snmw)},
		AccessibleTopology: &csi.Topology{Segments: map[string]string{controller.TopologyNode: "node-a"}},
	})
	require.NoError(t, err)
	assert.Equal(t, int64(100<<30), resp.GetAvailableCapacity())
	assert.Equal(t, int64(40<<30), resp.GetMaximumVolumeSize().GetValue())
	assert.Equal(t, [2]map[string]string{{"replicas": "3"}, {controller.TopologyNode: "node-a"}}, got)

	resp, err = h.GetCapacity(t.Context(), &csi.GetCapacityRequest{
		VolumeCapabilities: []*csi.VolumeCapability{mountCap(mnmw)},
	})
	require.NoError(t, err)
	assert.Zero(t, resp.GetAvailableCapacity(), "no room for what cannot be made")

	_, err = h.GetCapacity(t.Context(), &csi.GetCapacityRequest{
		AccessibleTopology: &csi.Topology{Segments: map[string]string{"other/key": "x"}},
	})
	requireCode(t, codes.InvalidArgument, err)
	h.ctrl.fail("Capacity", trivet.ErrUnavailable)
	_, err = h.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	requireCode(t, codes.Unavailable, err)
}

// TestListVolumes pages through volumes while they come and go.
func TestListVolumes(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	for i := 1; i <= 9; i++ {
		v := meta.Volume{ID: trivet.VolumeID(i), Name: strconv.Itoa(i), SizeBytes: 1 << 20, Phase: meta.PhaseBound}
		switch i {
		case 2:
			v.Attached = &meta.Attachment{Node: thisNode}
		case 3:
			v.Detaching = otherNode
		case 4:
			v.Attached, v.Detaching = &meta.Attachment{Node: thisNode}, otherNode
		case 7:
			v.Phase = meta.PhaseDeleting
		case 8:
			v.Phase = meta.PhaseReleased
		}
		h.ctrl.put(v)
	}
	list := func(token string, entries int32) (got []string, next string) {
		resp, err := h.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: entries})
		require.NoError(t, err)
		for _, e := range resp.GetEntries() {
			id, err := trivet.ParseVolumeID(e.GetVolume().GetVolumeId())
			require.NoError(t, err)
			got = append(got, fmt.Sprintf("%d@%s", uint64(id), strings.Join(e.GetStatus().GetPublishedNodeIds(), "+")))
		}
		return got, resp.GetNextToken()
	}
	all, next := list("", 0)
	assert.Equal(t, []string{"1@", "2@node-a", "3@node-b", "4@node-a+node-b", "5@", "6@", "9@"}, all)
	assert.Empty(t, next)

	page, next := list("", 3)
	assert.Equal(t, all[:3], page)
	require.NoError(t, h.ctrl.DeleteVolume(t.Context(), 3), "the page's last volume goes, and with it the token's")
	page, next = list(next, 3)
	assert.Equal(t, all[3:6], page)
	page, next = list(next, 3)
	assert.Equal(t, all[6:], page)
	assert.Empty(t, next)
	_, next = list("", 6)
	assert.Empty(t, next, "exactly one page")

	for _, token := range []string{"invalid-token", "meta", "vol-0000000000000000", strings.Repeat("x", 200)} {
		_, err := h.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token})
		requireCode(t, codes.Aborted, err)
	}
	_, err := h.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	requireCode(t, codes.InvalidArgument, err)
	h.ctrl.fail("Volumes", trivet.ErrUnavailable)
	_, err = h.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	requireCode(t, codes.Unavailable, err)
}

// TestAttachLimit: a node takes as many volumes as it said, those on their way included.
func TestAttachLimit(t *testing.T) {
	t.Parallel()
	const limit = 3
	h := open(t, func(h *harness, _ *driver.Config) { h.node.info.MaxVolumes = limit })
	handles := make([]string, limit+1)
	for i := range handles {
		handles[i] = h.mustCreate(t, strconv.Itoa(i))
	}
	publish := func(handle string) error {
		_, err := h.ControllerPublishVolume(t.Context(), publishReq(handle))
		return err
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	h.ctrl.on("Attach", func(context.Context, any) error {
		entered <- struct{}{}
		<-leave
		return nil
	})
	answers := make(chan error, limit)
	for _, handle := range handles[:limit] {
		go func() { answers <- publish(handle) }()
		<-entered
	}
	requireCode(t, codes.ResourceExhausted, publish(handles[limit]))
	h.ctrl.on("Attach", nil)
	close(leave)
	for range limit {
		require.NoError(t, <-answers)
	}
	requireCode(t, codes.ResourceExhausted, publish(handles[limit]))
	require.NoError(t, publish(handles[0]), "a volume that the node holds needs no place")

	_, err := h.ControllerUnpublishVolume(t.Context(),
		&csi.ControllerUnpublishVolumeRequest{VolumeId: handles[0], NodeId: string(thisNode)})
	require.NoError(t, err)
	require.NoError(t, publish(handles[limit]), "a place is free")

	// More than the limit, as after it was lowered: what the node holds stays as it is.
	over := h.ctrl.put(meta.Volume{
		Phase: meta.PhaseBound, Epoch: 1, FencedEpoch: 1,
		Attached: &meta.Attachment{Node: thisNode, Mode: meta.SingleNodeMultiWriter, Epoch: 1},
	})
	require.NoError(t, publish(over.ID.String()))
	requireCode(t, codes.ResourceExhausted, publish(handles[0]))

	h.ctrl.fail("Volumes", trivet.ErrUnavailable)
	requireCode(t, codes.Unavailable, publish(handles[1]))
}
