package bridge

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/crisp-cri/crisp/network"
)

// maxPodCIDR bounds the text in bytes: two ranges, the longest of which has 43.
const maxPodCIDR = 128

// ParsePodCIDR reads the pod_cidr of the CRI's UpdateRuntimeConfig: one range, or
// one of each family separated by a comma, the primary first. Errors wrap
// network.ErrInvalid and name the field and the entry.
func ParsePodCIDR(s string) ([]netip.Prefix, error) {
	if len(s) > maxPodCIDR {
		return nil, fmt.Errorf("pod_cidr: %w: %d bytes long, at most %d", network.ErrInvalid, len(s), maxPodCIDR)
	}
	var ranges []netip.Prefix
	for entry := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(entry))
		if err != nil {
			return nil, fmt.Errorf("pod_cidr %q: %w: entry %d: %q is not a range like 10.1.2.0/24 or fd00:1::/64", s, network.ErrInvalid, len(ranges)+1, entry)
		}
		ranges = append(ranges, p)
	}
	if err := checkRanges(ranges); err != nil {
		return nil, fmt.Errorf("pod_cidr %q: %w", s, err)
	}
	return ranges, nil
}

// checkRanges reports what makes a list of pod ranges unusable: each must be good,
// and at most one of each family.
func checkRanges(ranges []netip.Prefix) error {
	if len(ranges) == 0 {
		return fmt.Errorf("%w: no pod range", network.ErrInvalid)
	}
	var have4, have6 bool
	for i, p := range ranges {
		if err := checkRange(p); err != nil {
			return fmt.Errorf("%w: entry %d: %s: %s", network.ErrInvalid, i+1, p, err)
		}
		seen := &have6
		if p.Addr().Is4() {
			seen = &have4
		}
		if *seen {
			return fmt.Errorf("%w: entry %d: %s: a second range of the same family", network.ErrInvalid, i+1, p)
		}
		*seen = true
	}
	return nil
}

// checkRange reports what makes a range unusable for pods. The error is only the
// reason.
func checkRange(p netip.Prefix) error {
	a := p.Addr()
	reason := ""
	switch {
	case !p.IsValid():
		reason = "not a range"
	case a.Is4In6():
		reason = "an IPv4 range in IPv6 form; write it as IPv4"
	case p != p.Masked():
		reason = fmt.Sprintf("has bits set behind the prefix; did you mean %s?", p.Masked())
	case a.Is4() && p.Bits() > 30, a.Is6() && p.Bits() > 126:
		reason = "too small: no address is left for a pod"
	case p.Bits() < 8:
		reason = "too large: the prefix must have 8 bits or more"
	case a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240):
		reason = "a reserved range"
	case a.IsLoopback() || p.Contains(netip.IPv6Loopback()):
		reason = "a loopback range"
	case a.IsMulticast():
		reason = "a multicast range"
	case a.IsLinkLocalUnicast():
		reason = "a link-local range"
	default:
		return nil
	}
	return fmt.Errorf("%s", reason)
}
