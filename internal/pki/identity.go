package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
)

// Role says what the holder of a certificate may be.
type Role string

// The roles.
const (
	RoleNode   Role = "node"   // a `trivet server`; may serve and may call other nodes
	RoleClient Role = "client" // an operator or a tool; may call, never serve
	RoleIssuer Role = "issuer" // hands out certificates to nodes; serves them and nobody else, never calls
	RoleCA     Role = "ca"     // signs the others; never a party to a connection
)

// leafRoles are the roles of those who make connections.
var leafRoles = []Role{RoleNode, RoleClient, RoleIssuer}

// uriScheme is the scheme of the URI in every certificate of ours.
const uriScheme = "trivet"

// Identity is who a certificate speaks for. It travels as the one URI among the certificate's
// subject alternative names: trivet://<cluster>/<role>/<name>.
type Identity struct {
	Cluster trivet.ClusterID
	Role    Role
	Name    string // of a node its NodeID; of the others any name of that form
}

// String returns the URI.
func (id Identity) String() string {
	return fmt.Sprintf("%s://%s/%s/%s", uriScheme, id.Cluster, id.Role, id.Name)
}

// Validate returns ErrInvalid unless cluster is a UUID, the role is known and the name has the form
// of a node name.
func (id Identity) Validate() error {
	if err := trivet.ValidateUUID(string(id.Cluster)); err != nil {
		return fmt.Errorf("identity %s: cluster: %w", id, err)
	}
	if id.Role != RoleCA && !slices.Contains(leafRoles, id.Role) {
		return fmt.Errorf("identity %s: role %q, want one of %s or %s: %w",
			id, id.Role, leafRoles, RoleCA, trivet.ErrInvalid)
	}
	if err := trivet.ValidateNodeID(id.Name); err != nil {
		return fmt.Errorf("identity %s: name: %w", id, err)
	}
	return nil
}

// ParseIdentity is the inverse of String. It returns ErrInvalid for anything else.
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, uriScheme+"://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 {
		return Identity{}, fmt.Errorf("identity %q: want %s://cluster/role/name: %w", s, uriScheme, trivet.ErrInvalid)
	}
	id := Identity{Cluster: trivet.ClusterID(parts[0]), Role: Role(parts[1]), Name: parts[2]}
	return id, id.Validate()
}

// IdentityOf returns the identity in the peer's certificate of a connection made with a
// configuration of this package, which has verified it. It returns ErrInvalid when the certificate
// carries none, which such a connection excludes.
func IdentityOf(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, fmt.Errorf("peer sent no certificate: %w", trivet.ErrInvalid)
	}
	return identityIn(cs.PeerCertificates[0])
}

// identityIn returns the identity in a certificate: its only URI. Two would leave open which counts.
func identityIn(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 {
		return Identity{}, fmt.Errorf("certificate of %q has %d URIs, want one identity: %w",
			cert.Subject, len(cert.URIs), trivet.ErrInvalid)
	}
	return ParseIdentity(cert.URIs[0].String())
}

// uri returns the identity as it goes into a certificate.
func (id Identity) uri() *url.URL {
	return &url.URL{Scheme: uriScheme, Host: string(id.Cluster), Path: "/" + string(id.Role) + "/" + id.Name}
}
