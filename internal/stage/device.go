package stage

// DeviceSummary is the kernel device of a volume, and what its kernel sent again since this process has it.
type DeviceSummary struct {
	Path string // such as /dev/loop3

	// Tells says that a device of its kind tells which requests are sent again; without, the counts mean nothing.
	Tells             bool
	Repeated, Refused uint64 // carried out, and answered with an error
}

// SetDevice says what Watch reports as the volume's kernel device; nil = it has none.
func (v *Volume) SetDevice(get func() DeviceSummary) {
	switch {
	case v == nil:
	case get == nil:
		v.device.Store(nil)
	default:
		v.device.Store(&get)
	}
}

// Device returns the volume's kernel device, nil if it has none.
func (v *Volume) Device() *DeviceSummary {
	get := v.device.Load()
	if get == nil {
		return nil
	}
	d := (*get)()
	return &d
}
