package bridge

import (
	"testing"

	"go.uber.org/goleak"
)

// A goroutine that outlives its test belongs to a Bridge that was not closed.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}
