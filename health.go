package trivet

import "slices"

// HealthStatus says how much a Condition takes from who uses a volume, in the terms of CSI 1.13.
type HealthStatus string

// The statuses.
const (
	HealthDegraded     HealthStatus = "Degraded"     // it can be used, but not as it should be: the next fault may stop it
	HealthInaccessible HealthStatus = "Inaccessible" // it cannot be read or written now
	HealthDataLoss     HealthStatus = "DataLoss"     // something that was acknowledged is gone, or very likely so
)

// Condition is one thing that is not as it should be. Nothing wrong is no Condition.
type Condition struct {
	Status  HealthStatus
	Reason  string // CamelCase, for programs; with Status unique in a list
	Message string // for people
}

// AddCondition appends c to a list, or its message to the entry that has its status and reason: a list has each pair
// once.
func AddCondition(list []Condition, c Condition) []Condition {
	i := slices.IndexFunc(list, func(have Condition) bool {
		return have.Status == c.Status && have.Reason == c.Reason
	})
	if i < 0 {
		return append(list, c)
	}
	if list[i].Message != c.Message {
		list[i].Message += "; " + c.Message
	}
	return list
}
