package cri

import (
	"crypto/rand"
	"errors"
	"sync"
	"time"
)

// Of the tokens in streaming URLs; the numbers are containerd's and CRI-O's.
const (
	tokenLife = time.Minute
	maxTokens = 1000 // that nobody has used yet
)

// errTokens is returned when too many sessions were asked for that nobody then opened.
var errTokens = errors.New("too many streaming URLs are unused; they expire after a minute")

// tokens are the URLs given out and not used yet. Who has a token has what it is for, so it cannot be guessed, is good once, and expires.
// The zero value is ready for use.
type tokens struct {
	mu     sync.Mutex
	unused map[string]ticket
}

// ticket is what a token is for.
type ticket struct {
	method  string // of the URL
	request any
	expires time.Time
}

// add makes a token; errTokens when there are too many.
func (t *tokens) add(method string, request any) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for token, k := range t.unused {
		if now.After(k.expires) {
			delete(t.unused, token)
		}
	}
	if len(t.unused) >= maxTokens {
		return "", errTokens
	}
	if t.unused == nil {
		t.unused = map[string]ticket{}
	}
	token := rand.Text() // at least 128 bits
	t.unused[token] = ticket{method, request, now.Add(tokenLife)}
	return token, nil
}

// take is what a token is for. It is used up, also by one who has its method wrong.
func (t *tokens) take(method, token string) (request any, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.unused[token]
	delete(t.unused, token)
	if !ok || k.method != method || time.Now().After(k.expires) {
		return nil, false
	}
	return k.request, true
}
