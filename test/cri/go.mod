// The suite that drives a real crispd through the kubelet's own client: a module
// of its own, so that the product's go.mod stays lean.
module github.com/crisp-cri/crisp/test/cri

go 1.26.5

replace github.com/crisp-cri/crisp => ../..

require k8s.io/cri-client v0.37.2 // indirect
