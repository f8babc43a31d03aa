// Package controller decides what may happen in a cluster.
//
// It has two parts. The Catalogue is this node's member of the meta group: it replicates the state
// machine of package meta, takes commands on any node and forwards them to the leader, and gives
// linearizable reads. The Controller sits on top and offers the verbs that users have (create,
// attach, detach, release, …): each one reads the catalogue, proposes commands and waits until the
// node agents have reported that the machines match. It never calls a node: agents read the
// catalogue and reconcile.
//
// What it guarantees:
//   - Every verb may be repeated, after any error, with the same outcome.
//   - A verb that ends for lack of time or of a quorum returns ErrUnavailable: the outcome is not
//     known, work goes on, and the same call again picks it up. Nothing is left that the same call
//     would not find and finish or remove.
//   - Attach returns when the fence of its epoch is committed in the volume's own group, and Detach
//     when the fence behind the old holder is (H12).
//   - Two verbs at once on one volume, or one name, in one process: the second gets ErrPending.
//
// Who is allowed to call a verb is the caller's business. What a node may say about which machine is
// checked here, by the certificate of the node that sent it (authorize.go).
package controller
