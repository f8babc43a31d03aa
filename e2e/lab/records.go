package lab

import (
	"bytes"
	"net"
	"slices"
)

// serviceList is what is read of a ServiceList.
type serviceList struct {
	Items []struct {
		Metadata objectMeta `json:"metadata"`
		Spec     struct {
			ClusterIP string `json:"clusterIP"`
		} `json:"spec"`
	} `json:"items"`
}

// sliceList is what is read of an EndpointSliceList.
type sliceList struct {
	Items []struct {
		Metadata  objectMeta `json:"metadata"`
		Endpoints []endpoint `json:"endpoints"`
	} `json:"items"`
}

type objectMeta struct {
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
}

type endpoint struct {
	Addresses  []string `json:"addresses"`
	Hostname   string   `json:"hostname"`
	Conditions struct {
		Ready *bool `json:"ready"` // nil means yes; true for all of a Service with publishNotReadyAddresses
	} `json:"conditions"`
}

// serviceLabel on an EndpointSlice names its Service.
const serviceLabel = "kubernetes.io/service-name"

// makeRecords turns Services into names and addresses, after Kubernetes' DNS specification: a Service
// has its address; a headless one has those of its ready pods, and each pod with a hostname its own
// name below that of the Service. A headless Service without a ready pod has no name: the
// specification demands NXDOMAIN.
func makeRecords(services serviceList, all sliceList) map[string][]net.IP {
	records := map[string][]net.IP{}
	headless := map[string]bool{}
	for _, s := range services.Items {
		name := serviceName(s.Metadata.Name, s.Metadata.Namespace)
		if s.Spec.ClusterIP == "None" {
			headless[name] = true
		} else {
			add(records, name, s.Spec.ClusterIP)
		}
	}
	for _, s := range all.Items {
		name := serviceName(s.Metadata.Labels[serviceLabel], s.Metadata.Namespace)
		if !headless[name] {
			continue
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, a := range e.Addresses {
				add(records, name, a)
				if e.Hostname != "" {
					add(records, e.Hostname+"."+name, a)
				}
			}
		}
	}
	for _, ips := range records {
		slices.SortFunc(ips, func(a, b net.IP) int { return bytes.Compare(a, b) })
	}
	return records
}

func serviceName(name, namespace string) string {
	return name + "." + namespace + ".svc." + clusterDomain
}

// add notes an IPv4 address once.
func add(records map[string][]net.IP, name, address string) {
	ip := net.ParseIP(address).To4()
	if ip == nil || slices.ContainsFunc(records[name], ip.Equal) {
		return
	}
	records[name] = append(records[name], ip)
}
