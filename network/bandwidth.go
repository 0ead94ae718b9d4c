package network

import (
	"fmt"
	"strconv"
	"strings"
)

// Annotations that ask for a limit of the pod's bandwidth, in bits per second as a
// Kubernetes quantity ("10M"). (Kubernetes documentation, "Network Plugins",
// "Support traffic shaping".)
const (
	annotationIngress = "kubernetes.io/ingress-bandwidth"
	annotationEgress  = "kubernetes.io/egress-bandwidth"
)

// Limits of those annotations, in bits per second: the kubelet's
// (pkg/util/bandwidth in Kubernetes 1.x, kept by CNI users since).
const (
	minBandwidth = 1e3
	maxBandwidth = 1e15
)

// quantitySuffixes of Kubernetes quantities (apimachinery pkg/api/resource) above 1.
var quantitySuffixes = map[string]float64{
	"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
	"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}

// Bandwidth limits a pod, in bits per second; 0: no limit.
type Bandwidth struct {
	Ingress, Egress uint64
}

// BandwidthOf reads a pod's annotations. A malformed or senseless one is ErrInvalid.
func BandwidthOf(annotations map[string]string) (b Bandwidth, err error) {
	for _, a := range []struct {
		name string
		to   *uint64
	}{{annotationIngress, &b.Ingress}, {annotationEgress, &b.Egress}} {
		s, ok := annotations[a.name]
		if !ok {
			continue
		}
		if *a.to, err = parseBandwidth(s); err != nil {
			return Bandwidth{}, fmt.Errorf("annotation %s: %w", a.name, err)
		}
	}
	return b, nil
}

// parseBandwidth returns bits per second.
func parseBandwidth(s string) (uint64, error) {
	digits := strings.TrimRight(s, "kKMGTPi")
	factor, known := quantitySuffixes[s[len(digits):]]
	if len(s) > 32 || digits == "" || !known || strings.Trim(digits, "0123456789.") != "" {
		return 0, fmt.Errorf("%w: %q is not a quantity like 10M", ErrInvalid, s[:min(len(s), 32)])
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %q is not a quantity like 10M", ErrInvalid, s)
	}
	if n *= factor; n < minBandwidth || n > maxBandwidth {
		return 0, fmt.Errorf("%w: %q is out of range: 1k to 1P bits per second", ErrInvalid, s)
	}
	return uint64(n), nil
}
