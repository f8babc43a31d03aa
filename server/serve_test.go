package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/internal/testutil"
)

// TestServeOnTheNetwork reads and writes a volume over TLS with the programs that people use.
func TestServeOnTheNetwork(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a cluster and other programs")
	}
	c := testutil.StartCluster(t, 1, nil)
	require.NoError(t, again(t, func() error {
		_, err := c.Admin(0).CreateVolume(t.Context(), &api.CreateVolumeRequest{
			Name: "db", SizeBytes: 64 << 20, Parameters: map[string]string{"replicas": "1"},
		})
		return err
	}))
	dir := t.TempDir()
	operators := writeX509(t, filepath.Join(dir, "operators"))
	image, back := filepath.Join(dir, "image"), filepath.Join(dir, "back")
	data := make([]byte, 64<<20)
	_, err := rand.Read(data[5<<20 : 9<<20])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(image, data, 0o600))

	t.Run("certificates of the operator's", func(t *testing.T) {
		u := serveTLS(t, c.Admin(0), &api.ServeVolumeRequest{
			Name: "db", Listen: "127.0.0.1:0", TlsCert: filepath.Join(operators, "client-cert.pem"),
			TlsKey: filepath.Join(operators, "client-key.pem"), TlsCa: filepath.Join(operators, "ca-cert.pem"),
		})
		u.RawQuery = "tls-certificates=" + operators
		run(t, "nbdinfo", u.String())
		run(t, "nbdcopy", "--flush", image, u.String())
		run(t, "nbdcopy", u.String(), back)
		got, err := os.ReadFile(back)
		require.NoError(t, err)
		require.Equal(t, data, got)
		requireSparse(t, u.String(), back)
		options := "driver=nbd,host=" + u.Hostname() + ",port=" + u.Port() + ",export=db,tls-creds=tls0"
		run(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir="+operators,
			"--image-opts", options, "driver=raw,file.filename="+image)

		strangers := writeX509(t, filepath.Join(dir, "strangers"))
		require.NoError(t, copyFile(filepath.Join(operators, "ca-cert.pem"), filepath.Join(strangers, "ca-cert.pem")))
		u.RawQuery = "tls-certificates=" + strangers
		require.Error(t, tryRun(t, "nbdinfo", u.String()), "a certificate of another CA")
		u.Scheme, u.RawQuery = "nbd", ""
		require.Error(t, tryRun(t, "nbdinfo", u.String()), "no TLS")
	})
	t.Run("certificates of the cluster's", func(t *testing.T) {
		u := serveTLS(t, c.Admin(0), &api.ServeVolumeRequest{Name: "db", Listen: "127.0.0.1:0"})
		creds, err := pki.Open(c.Path("client"), pki.RoleClient, nil)
		require.NoError(t, err)
		require.NoError(t, listOverTLS(t, u.Host, creds.ClientConfig("node-0")))
		require.Error(t, listOverTLS(t, u.Host, creds.ClientConfig("node-1")), "the server is another node")
		require.Error(t, listOverTLS(t, u.Host, &tls.Config{
			MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
		}), "no certificate")
		u.RawQuery = "tls-certificates=" + operators
		require.Error(t, tryRun(t, "nbdinfo", u.String()), "a certificate of another CA")
	})
}

// listOverTLS starts TLS as proto.md says, from its text, and asks for the exports.
func listOverTLS(t *testing.T, address string, config *tls.Config) error {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", address)
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.ReadFull(conn, make([]byte, 18))
	require.NoError(t, err)
	_, err = conn.Write([]byte("\x00\x00\x00\x01IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00"))
	require.NoError(t, err)
	reply := make([]byte, 20)
	_, err = io.ReadFull(conn, reply)
	require.NoError(t, err)
	const ack = "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x05\x00\x00\x00\x01\x00\x00\x00\x00"
	require.Equal(t, ack, string(reply))
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(t.Context()); err != nil {
		return err
	}
	_, err = secure.Write([]byte("IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00"))
	require.NoError(t, err)
	_, err = io.ReadFull(secure, reply) // TLS 1.3: here the client hears that it was refused
	return err
}

// serveTLS serves a volume until the end of the test.
func serveTLS(t *testing.T, admin api.AdminClient, r *api.ServeVolumeRequest) *url.URL {
	t.Helper()
	resp, stop := serve(t, admin, r)
	t.Cleanup(func() {
		stop()
		require.Eventually(t, func() bool { // the server detaches
			v, err := admin.GetVolume(context.WithoutCancel(t.Context()), &api.VolumeRequest{Name: r.GetName()})
			return err == nil && v.GetAttachedNode() == ""
		}, time.Minute, 50*time.Millisecond)
		awaitUnlocked(t, admin, r.GetName())
	})
	u, err := url.Parse(resp.GetUri())
	require.NoError(t, err)
	require.Equal(t, "nbds", u.Scheme)
	require.Equal(t, "/db", u.Path)
	return u
}

func TestServeRefuses(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	c := testutil.StartCluster(t, 1, nil)
	for name, r := range map[string]*api.ServeVolumeRequest{
		"nowhere":            {Name: "db"},
		"both":               {Name: "db", Socket: "/run/x", Listen: "127.0.0.1:0"},
		"a relative socket":  {Name: "db", Socket: "x"},
		"a socket with tls":  {Name: "db", Socket: "/run/x", TlsCert: "/a", TlsKey: "/b", TlsCa: "/c"},
		"half a certificate": {Name: "db", Listen: "127.0.0.1:0", TlsCert: "/a"},
		"no such files":      {Name: "db", Listen: "127.0.0.1:0", TlsCert: "/none/a", TlsKey: "/none/b", TlsCa: "/none/c"},
		"relative files":     {Name: "db", Listen: "127.0.0.1:0", TlsCert: "a", TlsKey: "b", TlsCa: "c"},
	} {
		stream, err := c.Admin(0).ServeVolume(t.Context(), r)
		require.NoError(t, err, name)
		_, err = stream.Recv()
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%s: %v", name, err)
	}
}

func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("needs the program %s", program)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	require.NoError(t, err, "%s %s: %s", program, strings.Join(args, " "), out)
	return string(out)
}

// tryRun runs a program that should fail.
func tryRun(t *testing.T, program string, args ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	err := exec.CommandContext(ctx, program, args...).Run()
	require.NoError(t, ctx.Err(), "it hangs")
	return err
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

// writeX509 writes a CA and a certificate for 127.0.0.1 into dir, under the names that libnbd and QEMU
// look for, and returns dir.
func writeX509(t *testing.T, dir string) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o700))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: dir}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	writePEM(t, filepath.Join(dir, "client-key.pem"), "PRIVATE KEY", keyDER)
	for name, template := range map[string]*x509.Certificate{"ca-cert.pem": ca, "client-cert.pem": leaf} {
		der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, key)
		require.NoError(t, err)
		writePEM(t, filepath.Join(dir, name), "CERTIFICATE", der)
	}
	return dir
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}
