package blockdev

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestNBDStalledClients: who stops in the middle of something is cut off after a while; who is silent
// between two requests is not.
func TestNBDStalledClients(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		enter bool // through the handshake
		send  []byte
		after time.Duration // it is cut off; 0: never
	}{
		"nothing said":         {false, nil, nbdHandshakeWait},
		"half an option":       {false, nbdOption(nbdOptGo, nbdInfoData("v"))[:20], nbdHandshakeWait},
		"half a request":       {true, nbdHeader(nbdCmdRead, 0, 1, 0, 4096)[:27], nbdStallWait},
		"half a write":         {true, append(nbdHeader(nbdCmdWrite, 0, 1, 0, 8192), make([]byte, 4096)...), nbdStallWait},
		"half a refused write": {true, append(nbdHeader(nbdCmdWrite, 0, 1, 512, 8192), make([]byte, 4096)...), nbdStallWait},
		"reply not read":       {true, nbdHeader(nbdCmdRead, 0, 1, 0, 1<<20), nbdStallWait},
		"no request":           {true, nil, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			client, server := net.Pipe()
			s := &nbdServer{
				export: nbdExport{name: "v", device: faultdev.NewMem(1 << 20)}, log: slog.New(slog.DiscardHandler),
				slots: make(chan struct{}, 1),
			}
			began, done := time.Now(), make(chan time.Duration, 1)
			go func() {
				s.handle(t.Context(), server)
				done <- time.Since(began)
			}()
			if c.enter {
				enterQuietly(t, client, "v")
			} else {
				greetNBD(t, client)
			}
			_, err := client.Write(c.send)
			require.NoError(t, err, name)
			if c.after == 0 {
				request := nbdHeader(nbdCmdFlush, 0, 1, 0, 0)
				writeBytes(t, client, request[:9]) // it is slow, but it gets there
				writeBytes(t, client, request[9:])
				_, err := io.ReadFull(client, make([]byte, nbdSimpleBytes))
				require.NoError(t, err, name)
				<-time.After(24 * time.Hour)
				require.Empty(t, done, "%s: it has done no wrong", name)
				require.NoError(t, client.Close())
				<-done
				return
			}
			require.Equal(t, c.after, <-done, name)
			require.Empty(t, s.slots, name)
			require.Empty(t, s.greeted, name)
		})
	}
}

// enterQuietly goes through the handshake, without a goroutine that reads replies.
func enterQuietly(t *testing.T, conn net.Conn, export string) {
	t.Helper()
	greetNBD(t, conn)
	askNBD(t, conn, nbdOptGo, nbdInfoData(export), nbdRepInfo, nbdRepInfo, nbdRepAck)
}

// TestNBDStalledClientHoldsNobodyUp: one client reads no replies and leaves writes half sent, with all
// its buffers out; another works on.
func TestNBDStalledClientHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 8<<20)
	bad, good := r.dial(t), goNBD(t, r.dial(t), "vol-1")
	enterQuietly(t, bad, "vol-1")
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range uint64(100) {
			if _, err := bad.Write(nbdHeader(nbdCmdRead, 0, i, 0, 8<<20)); err != nil {
				return // the test is over
			}
		}
	}()
	for range 20 {
		require.NoError(t, good.WriteAt(t.Context(), make([]byte, 1<<20), 0))
		require.NoError(t, good.ReadAt(t.Context(), make([]byte, 4<<20), 0))
	}
	require.NoError(t, bad.Close())
	<-sent
}

// TestNBDSilentCrowd: however many connect and say nothing, one more client gets through.
func TestNBDSilentCrowd(t *testing.T) {
	t.Parallel()
	r := startNBD(t, 1<<20)
	for range 3 * nbdGreetedMax {
		r.dial(t)
	}
	c := goNBD(t, r.dial(t), "vol-1")
	require.NoError(t, c.Flush(t.Context()))
}

// TestNBDCrowdIsBounded: one too many in their handshake ends the oldest, and only that one.
func TestNBDCrowdIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &nbdServer{export: nbdExport{name: "v"}, log: slog.New(slog.DiscardHandler)}
		began, after := time.Now(), make([]time.Duration, nbdGreetedMax+1)
		var clients sync.WaitGroup
		for i := range after {
			client, server := net.Pipe()
			s.greet(server)
			go s.handle(t.Context(), server)
			clients.Go(func() {
				_, _ = io.Copy(io.Discard, client) // ends when the server hangs up
				after[i] = time.Since(began)
			})
		}
		clients.Wait()
		require.Zero(t, after[0])
		for _, d := range after[1:] {
			require.Equal(t, nbdHandshakeWait, d)
		}
		synctest.Wait()
		require.Empty(t, s.greeted)
	})
}

// nbdCerts are certificates of a CA, for 127.0.0.1.
type nbdCerts struct {
	pool *x509.CertPool
	leaf tls.Certificate
}

func makeNBDCerts(t *testing.T) nbdCerts {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	require.NoError(t, err)
	parsed, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	c := nbdCerts{pool: x509.NewCertPool()}
	c.pool.AddCert(parsed)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err = x509.CreateCertificate(rand.Reader, leaf, parsed, &key.PublicKey, key)
	require.NoError(t, err)
	c.leaf = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return c
}

func (c nbdCerts) server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.leaf}, ClientCAs: c.pool,
		ClientAuth: tls.RequireAndVerifyClientCert,
	}
}

func (c nbdCerts) client(roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{c.leaf}, RootCAs: roots, ServerName: "127.0.0.1",
	}
}

func TestNBDTLS(t *testing.T) {
	t.Parallel()
	certs, others := makeNBDCerts(t), makeNBDCerts(t)
	r := startNBDWith(t, 1<<20, func(cfg *NBDConfig) { cfg.TLS = certs.server() })

	conn := r.dial(t)
	greetNBD(t, conn)
	for _, option := range []uint32{nbdOptList, nbdOptInfo, nbdOptGo, nbdOptStructuredReply, nbdOptSetMeta, 99} {
		askNBD(t, conn, option, nil, nbdRepTLSReqd)
	}
	askNBD(t, conn, nbdOptStartTLS, []byte{1}, nbdRepInvalid)
	askNBD(t, conn, nbdOptStartTLS, nil, nbdRepAck)
	secure := tls.Client(conn, certs.client(certs.pool))
	require.NoError(t, secure.HandshakeContext(t.Context()))
	askNBD(t, secure, nbdOptStartTLS, nil, nbdRepInvalid)
	askNBD(t, secure, nbdOptStructuredReply, nil, nbdRepAck)
	c := enterNBD(t, secure, "vol-1", nbdStructured)
	data := []byte{5, 4095: 6}
	require.NoError(t, c.WriteAt(t.Context(), data, 4096))
	got := make([]byte, 1<<20)
	require.NoError(t, c.ReadAt(t.Context(), got, 0))
	require.Equal(t, data, got[4096:8192])

	t.Run("abort in the open", func(t *testing.T) {
		conn := r.dial(t)
		greetNBD(t, conn)
		askNBD(t, conn, nbdOptAbort, nil, nbdRepAck)
	})
	t.Run("old export in the open", func(t *testing.T) {
		conn := r.dial(t)
		greetNBD(t, conn)
		writeBytes(t, conn, nbdOption(nbdOptExportName, []byte("vol-1")))
		_, err := conn.Read(make([]byte, 1))
		require.Error(t, err)
	})
	// CVE-2021-3716: what is said before TLS must not be taken for said within.
	t.Run("words before the handshake", func(t *testing.T) {
		conn := r.dial(t)
		greetNBD(t, conn)
		writeBytes(t, conn, append(nbdOption(nbdOptStartTLS, nil), nbdOption(nbdOptList, nil)...))
		kind, _ := readOptionReply(t, conn, nbdOptStartTLS)
		require.EqualValues(t, nbdRepAck, kind)
		require.Error(t, tls.Client(conn, certs.client(certs.pool)).HandshakeContext(t.Context()))
	})
	for name, config := range map[string]*tls.Config{
		"no certificate": {MinVersion: tls.VersionTLS13, RootCAs: certs.pool, ServerName: "127.0.0.1"},
		"another ca's":   others.client(certs.pool),
	} {
		conn := r.dial(t)
		greetNBD(t, conn)
		askNBD(t, conn, nbdOptStartTLS, nil, nbdRepAck)
		secure := tls.Client(conn, config)
		_ = secure.HandshakeContext(t.Context()) // TLS 1.3: the server's refusal comes after it
		_, _ = secure.Write(nbdOption(nbdOptList, nil))
		_, err := secure.Read(make([]byte, 1))
		require.Error(t, err, name)
	}
	require.NoError(t, c.Flush(t.Context()), "the good client noticed nothing")
	require.ErrorIs(t, c.WriteAt(t.Context(), data, 1<<20), trivet.ErrOutOfRange)
}
