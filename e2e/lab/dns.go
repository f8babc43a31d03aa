package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

// dnsRefresh is how often the name server reads Services and their endpoints: the age that an answer
// may have.
const dnsRefresh = 500 * time.Millisecond

// runDNS is the name server of the cluster, a helper process on the host. It takes the path of a
// kubeconfig and the address to serve, and runs until it is killed.
func runDNS(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("the name server takes two arguments, not %d", len(args))
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	client, err := newAPIClient(args[0])
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	z := &zone{}
	go z.follow(ctx, client, log)
	return serveDNS(ctx, args[1], z)
}

// serveDNS answers over UDP and TCP until ctx ends or one of the two fails.
func serveDNS(ctx context.Context, address string, h dns.Handler) error {
	ended := make(chan error, 2)
	servers := []*dns.Server{{Addr: address, Net: "udp", Handler: h}, {Addr: address, Net: "tcp", Handler: h}}
	for _, s := range servers {
		go func() { ended <- s.ListenAndServe() }()
	}
	select {
	case err := <-ended:
		return fmt.Errorf("serve names at %s: %w", address, err)
	case <-ctx.Done():
		return nil
	}
}

// zone answers for cluster.local from the last complete reading of the API. Before the first it
// answers SERVFAIL: nothing is known, least of all that a name does not exist.
type zone struct {
	records atomic.Pointer[map[string][]net.IP]
}

// follow reads the API again and again. While it cannot be read the last answers stay.
func (z *zone) follow(ctx context.Context, client *apiClient, log *slog.Logger) {
	said := ""
	tick := time.NewTicker(dnsRefresh)
	defer tick.Stop()
	for ctx.Err() == nil {
		records, err := readRecords(ctx, client)
		now := ""
		if err == nil {
			z.records.Store(&records)
		} else {
			now = err.Error()
		}
		if now != said { // once a change, not once a reading
			log.Info("read services", "err", now)
			said = now
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func readRecords(ctx context.Context, client *apiClient) (map[string][]net.IP, error) {
	var services serviceList
	var slices sliceList
	text, err1 := client.get(ctx, "/api/v1/services?resourceVersion=0")
	text2, err2 := client.get(ctx, "/apis/discovery.k8s.io/v1/endpointslices?resourceVersion=0")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := errors.Join(json.Unmarshal(text, &services), json.Unmarshal(text2, &slices)); err != nil {
		return nil, fmt.Errorf("read services: %w", err)
	}
	return makeRecords(services, slices), nil
}

// ServeDNS implements dns.Handler.
func (z *zone) ServeDNS(w dns.ResponseWriter, question *dns.Msg) {
	answer := z.answer(question)
	_ = w.WriteMsg(answer) // a client that is gone needs no answer
}

// answer is the whole of the name server without its sockets. Every name has A records only; another
// type of a name that exists is an empty answer, and a name that does not exist NXDOMAIN. An empty
// node of the tree, such as svc.cluster.local, counts as not existing, which no resolver minds.
func (z *zone) answer(question *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(question)
	m.Authoritative = true
	m.RecursionAvailable = true // or some resolvers go looking for another
	records := z.records.Load()
	if records == nil || len(question.Question) != 1 {
		m.Rcode = dns.RcodeServerFailure
		return m
	}
	q := question.Question[0]
	name := strings.ToLower(q.Name)
	ips, ok := (*records)[strings.TrimSuffix(name, ".")]
	if !ok {
		m.Rcode = dns.RcodeNameError
		m.Ns = []dns.RR{soa()}
		return m
	}
	if q.Qtype != dns.TypeA {
		m.Ns = []dns.RR{soa()}
		return m
	}
	for _, ip := range ips {
		m.Answer = append(m.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, // TTL 0: do not keep
			A:   ip,
		})
	}
	return m
}

// soa makes negative answers valid for no time at all.
func soa() dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: clusterDomain + ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET},
		Ns:  "ns." + clusterDomain + ".", Mbox: "nobody." + clusterDomain + ".",
		Serial: 1, Refresh: 60, Retry: 60, Expire: 60,
	}
}
