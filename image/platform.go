package image

import (
	"runtime"

	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/cpu"
)

// hostPlatforms lists what this machine runs, best first. A variant "" stands
// for the architecture's basic one.
func hostPlatforms() []imagespec.Platform {
	arch := func(arch string, variants ...string) (list []imagespec.Platform) {
		for _, v := range variants {
			list = append(list, imagespec.Platform{OS: "linux", Architecture: arch, Variant: v})
		}
		return list
	}
	switch runtime.GOARCH {
	case "amd64":
		// The plain build comes first: it is the one that everybody runs.
		variants := []string{"", "v1"}
		v2 := cpu.X86.HasSSE42 && cpu.X86.HasPOPCNT && cpu.X86.HasSSSE3 && cpu.X86.HasCX16
		v3 := v2 && cpu.X86.HasAVX2 && cpu.X86.HasBMI1 && cpu.X86.HasBMI2 && cpu.X86.HasFMA
		if v3 {
			variants = append(variants, "v3")
		}
		if v2 {
			variants = append(variants, "v2")
		}
		return append(arch("amd64", variants...), arch("386", "")...)
	case "arm64":
		return append(arch("arm64", "", "v8"), arch("arm", "v8", "v7", "", "v6", "v5")...)
	case "arm":
		return arch("arm", "v7", "", "v6", "v5")
	}
	return arch(runtime.GOARCH, "")
}

// rank returns the place of p in the list, or -1. An empty field of p matches
// anything: old images leave them out.
func rank(platforms []imagespec.Platform, p imagespec.Platform) int {
	for i, want := range platforms {
		if (p.OS == "" || p.OS == want.OS) && (p.Architecture == "" || p.Architecture == want.Architecture) && p.Variant == want.Variant {
			return i
		}
	}
	return -1
}
