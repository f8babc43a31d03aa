// Package failover moves the pods that used volumes on a node which died to other nodes, without a human. It runs
// in the CSI controller on Kubernetes, in every replica, and the one that leads acts.
//
// Kubernetes itself will not: for a pod of a StatefulSet it waits until the kubelet of the node confirms that the
// pod is gone, and for a volume six minutes, because it cannot know that a node which does not answer does not
// write. Trivet does know. A volume is taken from a node by a fence that the volume's own Raft group commits, and
// after that nothing which the node still sends is accepted, however alive it is. So the order is:
//
//  1. A node counts as dead when its server has lost its lease in the catalogue *and* Kubernetes does not hear of it:
//     its kubelet has not renewed its Lease for Config.After, or all that time the node was not Ready. With the
//     taint node.kubernetes.io/out-of-service the second is taken as given.
//  2. Its volumes are fenced, each under the condition that the node is still away, which the catalogue checks.
//  3. The node gets the taint Taint, so that nothing new is put there while Kubernetes still takes it for Ready.
//  4. Only then the pods that use fenced volumes are removed, and their VolumeAttachments deleted.
//
// What fails is tried again in the next round, from the beginning: every step is idempotent. Two controllers at
// once do no harm for the same reason.
//
// Left alone are volumes whose claim is in a namespace that opts out (OptOut), nodes that come back in time, pods
// without a controller (nobody would make them again) and those of DaemonSets (they belong to that node), unless
// they are being deleted already. The taint is taken off when the node is back.
package failover
