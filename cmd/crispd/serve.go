package main

import (
	"context"
	"errors"
)

func serve(context.Context, *Config) error { return errors.New("serve is wired in a later commit") }
