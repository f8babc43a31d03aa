// Package vm boots a small virtual machine of a Debian kernel and an init of our own, for tests that
// need what the kernel of the machine at hand does not have: nbd, ublk, all capabilities.
//
// A guest lives in memory alone: an initramfs of one static init (package guest), the test binaries,
// programs of the host with their libraries, and kernel modules. It runs its commands one by one,
// streams what they print over a serial port, and leaves the number of those that failed with QEMU's
// isa-debug-exit device, so a verdict is a number of the guest's own and never read out of its text.
// A guest that ends in any other way, by a panic for one, has failed. Emulation is in software (no
// KVM), about ten times slower than the machine: nothing is measured in it.
//
// How to use it: `make vm-test`, or
//
//	dir=$(internal/vm/fetch.sh) && go run ./internal/vm/vmtest -kernel "$dir" -run TestVM -v ./node/blockdev
//
// It leaves to its caller: the kernel package (fetch.sh keeps it outside the tree) and qemu-system-x86_64.
// An image is built in memory from scratch each time, which takes a second or two.
package vm
