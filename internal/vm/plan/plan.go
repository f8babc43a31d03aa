// Package plan is what the maker of an image and the guest's init agree on.
package plan

const (
	// Path of the plan in the guest.
	Path = "/plan.json"

	// ExitPort is the I/O port of QEMU's isa-debug-exit device. A byte v written to it ends QEMU with the
	// exit code v<<1|1, so codes that come from the guest are odd.
	ExitPort = 0xf4

	// ExitPass plus the number of failures is what the guest writes. It is not zero, because QEMU exits
	// with 1 by itself when it cannot start.
	ExitPass = 0x10

	// FailsMax is the highest number of failures that the exit code can tell.
	FailsMax = 100 // exit codes end at 255
)

// Plan is what the guest does.
type Plan struct {
	// Modules are files with kernel modules, to be inserted in this order.
	Modules []string `json:"modules"`

	// Commands are run one after the other; the exit code of each tells whether it failed.
	Commands [][]string `json:"commands"`

	// Env of the commands, as NAME=value.
	Env []string `json:"env"`
}
