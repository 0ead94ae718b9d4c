package bridge

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/crisp-cri/crisp/network"
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

// checkBandwidth reports malformed or senseless bandwidth annotations, and whether
// there are any.
func checkBandwidth(annotations map[string]string) (limited bool, err error) {
	for _, name := range []string{annotationIngress, annotationEgress} {
		s, ok := annotations[name]
		if !ok {
			continue
		}
		limited = true
		if _, err := parseBandwidth(s); err != nil {
			return true, fmt.Errorf("annotation %s: %w", name, err)
		}
	}
	return limited, nil
}

// parseBandwidth returns bits per second.
func parseBandwidth(s string) (uint64, error) {
	digits := strings.TrimRight(s, "kKMGTPi")
	factor, known := quantitySuffixes[s[len(digits):]]
	if len(s) > 32 || digits == "" || !known || strings.Trim(digits, "0123456789.") != "" {
		return 0, fmt.Errorf("%w: %q is not a quantity like 10M", network.ErrInvalid, s[:min(len(s), 32)])
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %q is not a quantity like 10M", network.ErrInvalid, s)
	}
	if n *= factor; n < minBandwidth || n > maxBandwidth {
		return 0, fmt.Errorf("%w: %q is out of range: 1k to 1P bits per second", network.ErrInvalid, s)
	}
	return uint64(n), nil
}
