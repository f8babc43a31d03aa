// Package api is the administration protocol of a trivet server: gRPC over the cluster's mutual TLS,
// spoken by the trivet command and, for joining a cluster, by other servers. The Go code is
// generated from admin.proto by `make generate`.
package api
