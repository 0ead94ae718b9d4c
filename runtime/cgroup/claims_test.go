package cgroup

import (
	"context"
	"errors"
	"testing"
)

func TestClaims(t *testing.T) {
	done, cancel := context.WithCancel(context.Background())
	cancel() // who would have to wait is told at once
	tests := []struct {
		name         string
		kill, remove string
		excluded     bool
	}{
		{"the same", "/a/b", "/a/b", true},
		{"a kill below what is removed", "/a/b/exec", "/a/b", true},
		{"a kill above what is removed", "/a/b", "/a/b/exec", false},
		{"neighbours", "/a/b", "/a/bc", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newClaims()
			release, err := c.kill(done, tt.kill)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.remove(done, tt.remove); errors.Is(err, context.Canceled) != tt.excluded {
				t.Errorf("remove during kill: got %v, want excluded %v", err, tt.excluded)
			}
			release()
			c = newClaims()
			release, err = c.remove(done, tt.remove)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.kill(done, tt.kill); errors.Is(err, context.Canceled) != tt.excluded {
				t.Errorf("kill during remove: got %v, want excluded %v", err, tt.excluded)
			}
			waits := make(chan error)
			go func() {
				r, err := c.kill(context.Background(), tt.kill)
				if err == nil {
					r()
				}
				waits <- err
			}()
			release()
			if err := <-waits; err != nil {
				t.Errorf("after release: %v", err)
			}
		})
	}
}

func TestClaimsOfOneKindDoNotExcludeEachOther(t *testing.T) {
	c := newClaims()
	for range 2 {
		if _, err := c.kill(context.Background(), "/a"); err != nil {
			t.Fatal(err)
		}
	}
}
