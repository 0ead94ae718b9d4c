package image

import (
	"context"
	"errors"
	"flag"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false)
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	_ = flags.Set("stderrthreshold", "FATAL") // a known flag
	klog.SetOutput(io.Discard)                // tests read Problems
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

func TestFlightsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights
		calls := 0
		f := func(context.Context) (string, error) { calls++; time.Sleep(time.Minute); return "value", nil }
		leaders := make(chan bool, 10)
		for range 10 {
			go func() {
				led, value, err := g.do(t.Context(), "key", f)
				if value != "value" || err != nil {
					t.Errorf("got %q, %v", value, err)
				}
				leaders <- led
			}()
		}
		led := 0
		for range 10 {
			if <-leaders {
				led++
			}
		}
		if calls != 1 || led != 1 {
			t.Errorf("got %d calls and %d leaders, want 1 and 1", calls, led)
		}
		if _, _, err := g.do(t.Context(), "key", f); err != nil || calls != 2 {
			t.Errorf("afterwards: got %d calls, %v, want 2", calls, err)
		}
		g.close()
	})
}

// TestFlightsWaiters: the doing ends with its last waiter, not with its first caller.
func TestFlightsWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights
		ended := make(chan error, 1)
		f := func(ctx context.Context) (string, error) {
			<-ctx.Done()
			ended <- context.Cause(ctx)
			return "", context.Cause(ctx)
		}
		first, cancelFirst := context.WithCancel(t.Context())
		second, cancelSecond := context.WithCancel(t.Context())
		results := make(chan error, 2)
		for _, ctx := range []context.Context{first, second} {
			go func() { _, _, err := g.do(ctx, "key", f); results <- err }()
			synctest.Wait()
		}
		cancelFirst()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("first: got %v", err)
		}
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("ended with its first caller: %v", err)
		default:
		}
		cancelSecond()
		<-results
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		g.close()
		if _, _, err := g.do(t.Context(), "key", f); !errors.Is(err, errClosed) {
			t.Errorf("after close: got %v", err)
		}
	})
}

func TestFlightsClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights
		result := make(chan error)
		go func() {
			_, _, err := g.do(t.Context(), "key", func(ctx context.Context) (string, error) { <-ctx.Done(); return "", context.Cause(ctx) })
			result <- err
		}()
		synctest.Wait()
		g.close()
		if err := <-result; !errors.Is(err, errClosed) {
			t.Errorf("got %v, want %v", err, errClosed)
		}
	})
}

// TestFlightsSettle: with settle, the last to give up sees the doer gone.
func TestFlightsSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := flights{settle: true}
		cleaned := false
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, _, err := g.do(ctx, "key", func(ctx context.Context) (string, error) {
			<-ctx.Done()
			time.Sleep(time.Second)
			cleaned = true
			return "", context.Cause(ctx)
		})
		if !errors.Is(err, context.Canceled) || !cleaned {
			t.Errorf("got %v, cleaned %v", err, cleaned)
		}
		g.close()
	})
}
