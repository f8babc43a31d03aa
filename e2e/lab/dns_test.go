package lab

import (
	"encoding/json"
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// What the API server says of a headless Service with a ready and an unready pod, of one that
// publishes unready pods too (the API itself then calls them ready), and of an ordinary Service.
const (
	servicesJSON = `{"items": [
		{"metadata": {"name": "db", "namespace": "shop"}, "spec": {"clusterIP": "None"}},
		{"metadata": {"name": "all", "namespace": "shop"}, "spec": {"clusterIP": "None"}},
		{"metadata": {"name": "none", "namespace": "shop"}, "spec": {"clusterIP": "None"}},
		{"metadata": {"name": "api", "namespace": "shop"}, "spec": {"clusterIP": "10.213.0.7"}}
	]}`
	slicesJSON = `{"items": [
		{"metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}}, "addressType": "IPv4",
		 "endpoints": [
			{"addresses": ["10.213.11.2"], "hostname": "db-1", "conditions": {"ready": true}},
			{"addresses": ["10.213.10.2"], "hostname": "db-0", "conditions": {}},
			{"addresses": ["10.213.12.2"], "hostname": "db-2", "conditions": {"ready": false}}]},
		{"metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}}, "addressType": "IPv6",
		 "endpoints": [{"addresses": ["fd00::1"], "conditions": {"ready": true}}]},
		{"metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "all"}}, "addressType": "IPv4",
		 "endpoints": [{"addresses": ["10.213.10.3"], "conditions": {"ready": true, "serving": false}}]},
		{"metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "none"}}, "addressType": "IPv4",
		 "endpoints": [{"addresses": ["10.213.10.4"], "conditions": {"ready": false}}]},
		{"metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "api"}}, "addressType": "IPv4",
		 "endpoints": [{"addresses": ["10.213.10.5"], "conditions": {"ready": true}}]}
	]}`
)

func testZone(t *testing.T) *zone {
	t.Helper()
	var services serviceList
	var slices sliceList
	require.NoError(t, json.Unmarshal([]byte(servicesJSON), &services))
	require.NoError(t, json.Unmarshal([]byte(slicesJSON), &slices))
	records := makeRecords(services, slices)
	z := &zone{}
	z.records.Store(&records)
	return z
}

func TestNames(t *testing.T) {
	t.Parallel()
	z := testZone(t)
	for _, row := range []struct {
		name, question string
		kind           uint16
		rcode          int
		want           []string
	}{
		{
			"headless, ready pods only, sorted", "db.shop.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess,
			[]string{"10.213.10.2", "10.213.11.2"},
		},
		{"any case", "DB.Shop.svc.cluster.LOCAL.", dns.TypeA, dns.RcodeSuccess, []string{"10.213.10.2", "10.213.11.2"}},
		{"pod by hostname", "db-1.db.shop.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, []string{"10.213.11.2"}},
		{"pod that is not ready", "db-2.db.shop.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"unready pods published", "all.shop.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, []string{"10.213.10.3"}},
		{"headless without a ready pod", "none.shop.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"ordinary Service", "api.shop.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, []string{"10.213.0.7"}},
		{"no IPv6, but the name exists", "db.shop.svc.cluster.local.", dns.TypeAAAA, dns.RcodeSuccess, nil},
		{"other namespace", "db.default.svc.cluster.local.", dns.TypeA, dns.RcodeNameError, nil},
		{"outside", "example.com.", dns.TypeA, dns.RcodeNameError, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got := z.answer(new(dns.Msg).SetQuestion(row.question, row.kind))
			require.Equal(t, row.rcode, got.Rcode)
			var ips []string
			for _, rr := range got.Answer {
				a, ok := rr.(*dns.A)
				require.True(t, ok)
				require.Equal(t, row.question, a.Hdr.Name, "resolvers compare the name letter by letter")
				require.Zero(t, a.Hdr.Ttl)
				ips = append(ips, a.A.String())
			}
			require.Equal(t, row.want, ips)
			if len(row.want) == 0 {
				require.Len(t, got.Ns, 1, "a negative answer says how long it holds")
			}
		})
	}
}

// TestNamesBeforeTheFirstReading: to say that a name does not exist would make a client give up.
func TestNamesBeforeTheFirstReading(t *testing.T) {
	t.Parallel()
	got := (&zone{}).answer(new(dns.Msg).SetQuestion("db.shop.svc.cluster.local.", dns.TypeA))
	require.Equal(t, dns.RcodeServerFailure, got.Rcode)
}

func TestNamesOverASocket(t *testing.T) {
	t.Parallel()
	pc, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &dns.Server{PacketConn: pc, Handler: testZone(t)}
	ended := make(chan error, 1)
	go func() { ended <- s.ActivateAndServe() }()
	question := new(dns.Msg).SetQuestion("db-0.db.shop.svc.cluster.local.", dns.TypeA)
	got, _, err := (&dns.Client{Timeout: time.Minute}).Exchange(question, pc.LocalAddr().String())
	require.NoError(t, err)
	require.Len(t, got.Answer, 1)
	require.Contains(t, got.Answer[0].String(), "10.213.10.2")
	require.NoError(t, s.Shutdown())
	require.NoError(t, <-ended)
}
